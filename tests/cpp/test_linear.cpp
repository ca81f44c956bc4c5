// Linear and its gradients against double, on every instruction set.
#include "kernels/linear.h"
#include "support.h"

namespace seqkernels::test {

namespace {

struct LinearCase {
  static constexpr double kBound = 24;
  DType dtype = DType::f32;
  int64_t M = 0, N = 0, K = 0, apart = 0;  // rows of x and dy lie `apart` elements further than they are long
  bool bias = true;
  int threads = 1;

  DType rounding(const std::string&) const { return dtype; }
  std::string text() const {
    return "linear " + std::string(kDTypeNames[int(dtype)]) + " M=" + std::to_string(M) +
           " N=" + std::to_string(N) + " K=" + std::to_string(K) + " apart=" + std::to_string(apart) +
           " threads=" + std::to_string(threads);
  }
};

// C [m, n] = sum over k of a(m, k) b(k, n) + bias(n).
template <class A, class B, class Bias>
Values product(int64_t M, int64_t N, int64_t K, const A& a, const B& b, const Bias& bias) {
  Values c;
  for (int64_t m = 0; m < M; m++)
    for (int64_t n = 0; n < N; n++) {
      double sum = bias(n);
      for (int64_t k = 0; k < K; k++) sum += a(m, k) * b(k, n);
      c.push_back(sum);
    }
  return c;
}

void fill(LinearParams& p, const LinearCase& c, const Buffers& in, Parallel team) {
  p.dtype = c.dtype, p.M = c.M, p.N = c.N, p.K = c.K, p.parallel = team;
  p.x = pointer(in, "x"), p.x_m = c.K + c.apart, p.w = pointer(in, "w");
}
Buffers forward(const LinearCase& c, const Buffers& in, Parallel team) {
  Buffers out;
  out["y"] = Buffer(c.dtype, c.M * c.N);
  LinearFwdParams p;
  fill(p, c, in, team);
  p.b = pointer(in, "b"), p.y = pointer(out, "y");
  linear_fwd(p);
  return out;
}
Buffers backward(const LinearCase& c, const Buffers& in, Parallel team) {
  Buffers out;
  out["dx"] = Buffer(c.dtype, c.M * c.K), out["dw"] = Buffer(c.dtype, c.N * c.K);
  out["db"] = Buffer(c.dtype, c.N);
  LinearBwdParams p;
  fill(p, c, in, team);
  p.dy = pointer(in, "dy"), p.dy_m = c.N + c.apart;
  p.dx = pointer(out, "dx"), p.dw = pointer(out, "dw"), p.db = pointer(out, "db");
  linear_bwd(p);
  return out;
}

void check(const LinearCase& c, const std::vector<const char*>& isas, Random& random) {
  const int64_t x_m = c.K + c.apart, dy_m = c.N + c.apart;
  const auto rows = [&](int64_t ld, int64_t columns) { return c.M ? (c.M - 1) * ld + columns : 0; };
  Buffers in;
  in["x"] = Buffer(c.dtype, random.values(rows(x_m, c.K), 1));
  in["dy"] = Buffer(c.dtype, random.values(rows(dy_m, c.N), 1));
  in["w"] = Buffer(c.dtype, random.values(c.N * c.K, 0.3));
  if (c.bias) in["b"] = Buffer(c.dtype, random.values(c.N, 1));
  const Values x = in["x"].values(), dy = in["dy"].values(), w = in["w"].values(),
               b = c.bias ? in["b"].values() : Values(size_t(c.N), 0.0);

  const auto X = [&](int64_t m, int64_t k) { return x[size_t(m * x_m + k)]; };
  const auto DY = [&](int64_t m, int64_t n) { return dy[size_t(m * dy_m + n)]; };
  const auto WW = [&](int64_t n, int64_t k) { return w[size_t(n * c.K + k)]; };
  const auto none = [](int64_t) { return 0.0; };
  Truth y, grads;
  y["y"] = product(
      c.M, c.N, c.K, X, [&](int64_t k, int64_t n) { return WW(n, k); },
      [&](int64_t n) { return b[size_t(n)]; });
  grads["dx"] = product(c.M, c.K, c.N, DY, WW, none);
  grads["dw"] = product(c.N, c.K, c.M, [&](int64_t n, int64_t m) { return DY(m, n); }, X, none);
  grads["db"] = product(
      c.N, 1, c.M, [&](int64_t n, int64_t m) { return DY(m, n); }, [](int64_t, int64_t) { return 1.0; },
      none);

  const Parallel team = c.threads == 1 ? Parallel{} : threads(c.threads);
  const Parallel odd = random.one_in(2) ? nested(3) : busy(3);
  for (const char* isa : isas) {
    force_isa(isa);
    const Buffers out = forward(c, in, team), back = backward(c, in, team);
    expect_close(out, y, "linear forward", c);
    expect_close(back, grads, "linear backward", c);
    expect_same_bits(forward(c, in, odd), out, "other threads", c);
    expect_same_bits(backward(c, in, odd), back, "other threads", c);
    expect_unchanged(in, c);
    seen[isa] += 4, calls += 4, seen["linear"] += 4;
  }
}

}  // namespace

void check_linear(const std::vector<const char*>& isas) {
  Random random;
  const std::vector<int64_t> sizes{0, 1, 2, 7, 8, 9, 16, 31, 32, 33, 64, 70, 97};
  for (int dtype = 0; dtype < 4; dtype++) {
    for (int i = 0; i < 60; i++) {
      LinearCase c{DType(dtype), random.of(sizes), random.of(sizes), random.of(sizes), random.below(3)};
      c.bias = !random.one_in(4), c.threads = int(1 + random.below(4));
      check(c, isas, random);
    }
    check({DType(dtype), 230, 40, 33, 0, true, 3}, isas, random);   // several blocks of rows
    check({DType(dtype), 10, 35, 2100, 1, true, 2}, isas, random);  // several passes
    check({DType(dtype), 1100, 17, 5, 0, true, 2}, isas, random);   // of the rows, in backward
  }
}

}  // namespace seqkernels::test
