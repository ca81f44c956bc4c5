// Kernels around the recurrence: h_t by a projection, its gradient, h_{t-1} of every token, small uploads.
#include "sequence.cuh"
#include "step.cuh"

namespace seqkernels::cuda {

namespace {

struct ProjectFwd : FwdStep {
  const void* product;
};

template <class S>
__global__ void project_fwd_kernel(const ProjectFwd p) {
  for (int64_t i = first_item(); i < p.rows * p.P; i += item_stride()) {
    const int64_t b = i / p.P, u = i % p.P, at = (p.d * p.B + b) * p.P + u;
    const Acc<S> h = load<S>(p.product, i);
    store<S>(h, p.y, ((p.token + b) * p.D + p.d) * p.P + u);
    const bool reset = p.resets && p.next >= 0 && p.resets[p.next * p.B + b];
    store<S>(reset ? load<S>(p.h0, at) : h, p.hn, at);
  }
}

template <class S>
__global__ void project_bwd_kernel(const BwdStep p) {
  using A = Acc<S>;
  for (int64_t i = first_item(); i < rows_touched(p) * p.P; i += item_stride()) {
    const int64_t b = i / p.P, u = i % p.P, at = (p.d * p.B + b) * p.P + u;
    A dh = arriving<S>(p, b, u);
    if (b < p.rows) {
      dh += or_zero<S>(p.dy, ((p.token + b) * p.D + p.d) * p.P + u);
      store<S>(dh, p.dh_now, i);
      dh = A(0);
    }
    store<A>(dh, p.dh, at);
    if (p.rows == 0) store<S>(dh + or_zero<A>(p.dh_reset, at), p.dh0, at);
  }
}

struct Previous : Layer {
  const void* y;
  void* to[2];
};

template <class S>
__global__ void previous_kernel(const Previous p) {
  const int64_t row = p.D * p.P;
  for (int64_t i = first_item(); i < p.T * p.B * row; i += item_stride()) {
    const int64_t t = i / row / p.B, b = i / row % p.B, u = i % p.P;
    const int d = static_cast<int>(i % row / p.P);
    if (b >= rows_at(p, t)) continue;
    const int64_t before = d ? t + 1 : t - 1;
    const S* from = starts(p, d, t, b)
                        ? static_cast<const S*>(p.h0) + (d * p.B + b) * p.P
                        : static_cast<const S*>(p.y) + ((first_token(p, before) + b) * p.D + d) * p.P;
    static_cast<S*>(p.to[d])[(first_token(p, t) + b) * p.P + u] = from[u];
  }
}

struct Integers {
  static constexpr int kCount = 480;  // with `to` and `count` below 4 KiB
  int64_t value[kCount];
  int64_t* to;
  int64_t count;
};

__global__ void upload_kernel(const Integers p) {
  for (int64_t i = first_item(); i < p.count; i += item_stride()) p.to[i] = p.value[i];
}

}  // namespace

void project_fwd(const FwdStep& step, const void* product, Stream stream) {
  const ProjectFwd p{step, product};
  with_type(p.dtype,
            [&](auto s) { launch(project_fwd_kernel<decltype(s)>, "project_fwd", p, p.rows * p.P, stream); });
}

void project_bwd(const BwdStep& p, Stream stream) {
  with_type(p.dtype, [&](auto s) {
    launch(project_bwd_kernel<decltype(s)>, "project_bwd", p, rows_touched(p) * p.P, stream);
  });
}

void previous(const Layer& layer, const void* y, void* const (&to)[2], Stream stream) {
  const Previous p{layer, y, {to[0], to[1]}};
  with_type(p.dtype, [&](auto s) {
    launch(previous_kernel<decltype(s)>, "previous", p, p.T * p.B * p.D * p.P, stream);
  });
}

void upload(const int64_t* from, int64_t count, int64_t* to, Stream stream) {
  for (int64_t done = 0; done < count; done += Integers::kCount) {
    Integers p;
    p.to = to + done;
    p.count = count - done < Integers::kCount ? count - done : Integers::kCount;
    for (int64_t i = 0; i < p.count; i++) p.value[i] = from[done + i];
    launch(upload_kernel, "upload", p, p.count, stream);
  }
}

}  // namespace seqkernels::cuda
