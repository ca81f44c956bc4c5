// seqkernels._kernels: what tests and reports need of the kernels without torch, on NumPy arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/table.h"

namespace py = pybind11;
namespace sk = seqkernels;

namespace {

sk::DType dtype_of(const std::string& name) {
  if (name == "float32") return sk::DType::f32;
  if (name == "float64") return sk::DType::f64;
  if (name == "bfloat16") return sk::DType::bf16;
  if (name == "float16") return sk::DType::f16;
  throw std::invalid_argument("dtype: got \"" + name + "\", expected float32, float64, bfloat16 or float16");
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < sk::kIsaCount; i++) {
    const auto isa = static_cast<sk::Isa>(i);
    if (sk::isa_supported(isa)) names.emplace_back(sk::isa_name(isa));
  }
  return names;
}

// Best of five runs of 20 ms on all threads at once.
double fma_peak(const std::string& dtype, int threads) {
  if (threads < 1)
    throw std::invalid_argument("threads: expected at least 1, got " + std::to_string(threads));
  const sk::DType type = dtype_of(dtype);
  py::gil_scoped_release release;
  const auto run = [type](int64_t n) { return sk::kernels(type).fma_peak(type, n); };
  const auto seconds = [](auto begin) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  };
  int64_t n = 1000;
  for (auto begin = std::chrono::steady_clock::now(); run(n), seconds(begin) < 0.02; n *= 2)
    begin = std::chrono::steady_clock::now();
  double best = 0;
  for (int repeat = 0; repeat < 5; repeat++) {
    const auto begin = std::chrono::steady_clock::now();
    std::vector<std::thread> others;
    for (int i = 1; i < threads; i++) others.emplace_back([&] { run(n); });
    const double flops = run(n);
    for (auto& thread : others) thread.join();
    best = std::max(best, flops * threads / seconds(begin) / 1e9);
  }
  return best;
}

template <class T>
py::array_t<T> activation(int f, sk::DType dtype, const py::array_t<T, py::array::c_style>& x) {
  py::array_t<T> y(x.size());
  sk::kernels(dtype).activation(f, dtype, x.data(), y.mutable_data(), x.size());
  return y;
}

// One call of a layer's kernel: named arguments are checked and become parameters, results are new arrays.
class Call {
 public:
  using Shape = std::vector<py::ssize_t>;

  Call(sk::LayerParams& params, int gates, py::kwargs arguments) : p(params), left(std::move(arguments)) {
    const py::array x = required("x"), h0 = required("h0");
    const auto batch_sizes = optional("batch_sizes");
    for (const auto& w : py::iterable(left.attr("pop")("weights"))) weights.push_back(py::array::ensure(w));
    const size_t per = h0.ndim() == 3 && h0.shape(0) > 0 ? weights.size() / size_t(h0.shape(0)) : 0;
    const bool bias = per >= 4, projected = per % 2 == 1;
    if (h0.ndim() != 3 || h0.shape(0) > 2 || weights.size() != per * size_t(h0.shape(0)) || per < 2 ||
        per > 5 || (projected && gates != 4) || weights[0].ndim() != 2 || x.ndim() != (batch_sizes ? 2 : 3))
      throw std::invalid_argument(
          "expected x [T, B, I] or with batch_sizes [tokens, I], h0 [D, B, P], and for each of D directions "
          "w_ih, w_hh (, b_ih, b_hh) (, w_hr of an LSTM)");
    type = x.dtype();
    p.dtype = py::isinstance<py::array_t<double>>(x) ? sk::DType::f64 : sk::DType::f32;
    if (p.dtype == sk::DType::f32 && !py::isinstance<py::array_t<float>>(x))
      throw std::invalid_argument("x: expected float32 or float64");
    p.D = int(h0.shape(0)), p.B = h0.shape(1), p.P = h0.shape(2);
    p.I = x.shape(x.ndim() - 1), p.H = weights[0].shape(0) / gates;
    tokens = {x.shape(0)};
    if (batch_sizes) {
      p.T = batch_sizes->size();
      p.batch_sizes =
          static_cast<const int64_t*>(checked("batch_sizes", *batch_sizes, py::dtype::of<int64_t>(), {p.T}));
      py::ssize_t sum = 0;
      for (int64_t t = 0; t < p.T; t++) {
        if (p.batch_sizes[t] < 0 || p.batch_sizes[t] > (t ? p.batch_sizes[t - 1] : p.B))
          throw std::invalid_argument("batch_sizes: expected to begin at or below B and never to increase");
        sum += p.batch_sizes[t];
      }
      if (sum != x.shape(0))
        throw std::invalid_argument("batch_sizes: expected their sum to be the tokens of x");
    } else {
      p.T = x.shape(0);
      tokens.push_back(x.shape(1));
      if (x.shape(1) != p.B) throw std::invalid_argument("x and h0: expected the same B");
    }
    if (p.T < 1 || p.B < 1 || p.I < 1 || p.H < 1 || (!projected && p.P != p.H) ||
        x.strides(x.ndim() - 1) != x.itemsize())
      throw std::invalid_argument(
          "expected no empty dimension, x with unit stride in its last one and P = H but for projections");
    arrays.push_back(x);
    p.x = x.data();
    p.x_t = batch_sizes ? 0 : x.strides(0) / x.itemsize(), p.x_b = x.strides(x.ndim() - 2) / x.itemsize();
    p.h0 = checked("h0", h0, type, state());
    if (const auto resets = optional("resets")) {
      if (batch_sizes) throw std::invalid_argument("resets: expected a dense sequence");
      p.resets = static_cast<const uint8_t*>(checked("resets", *resets, py::dtype::of<bool>(), tokens));
    }
    for (int d = 0; d < p.D; d++) {
      const py::array* w = &weights[size_t(d) * per];
      const auto weight = [&](size_t i, const char* name, Shape shape) {
        return checked(name, w[i], type, shape);
      };
      const py::ssize_t rows = gates * p.H;
      p.w[d].w_ih = weight(0, "w_ih", {rows, p.I}), p.w[d].w_hh = weight(1, "w_hh", {rows, p.P});
      if (bias) p.w[d].b_ih = weight(2, "b_ih", {rows}), p.w[d].b_hh = weight(3, "b_hh", {rows});
      if (projected) p.w[d].w_hr = weight(per - 1, "w_hr", {p.P, p.H});
    }
    const int threads = argument("threads", 1);
    if (threads < 1) throw std::invalid_argument("threads: expected at least 1");
    p.parallel = {threads, &Call::run_on_threads, nullptr};
  }

  Shape state() const { return {p.D, p.B, p.P}; }
  Shape cell_state() const { return {p.D, p.B, p.H}; }
  Shape per_token(int64_t n) const {
    Shape shape = tokens;
    shape.push_back(p.D * n);
    return shape;
  }

  template <class T>
  T argument(const char* name, T otherwise) {
    return left.attr("pop")(name, otherwise).template cast<T>();
  }
  const void* in(const char* name, const Shape& shape) { return checked(name, required(name), type, shape); }
  const void* in_or_null(const char* name, const Shape& shape) {
    const auto array = optional(name);
    return array ? checked(name, *array, type, shape) : nullptr;
  }
  void* out(const char* name, const Shape& shape) {
    py::array array(type, shape);
    results[name] = array;
    return array.mutable_data();
  }

  // What the cells have in common.
  void outputs(sk::LayerFwdParams& fwd, bool has_gates) {
    fwd.y = out("y", per_token(p.P)), fwd.hn = out("hn", state());
    if (has_gates && argument("save_gates", true)) fwd.gates = out("gates", per_token(sk::kSavedGates * p.H));
  }
  void gradients(sk::LayerBwdParams& bwd, bool has_gates) {
    bwd.y = in("y", per_token(p.P));
    if (has_gates) bwd.gates = in_or_null("gates", per_token(sk::kSavedGates * p.H));
    bwd.dy = in_or_null("dy", per_token(p.P)), bwd.dhn = in_or_null("dhn", state());
    Shape x = tokens;
    x.push_back(p.I);
    bwd.dx = out("dx", x), bwd.dh0 = out("dh0", state());
    py::list dweights;
    for (int d = 0; d < p.D; d++) {
      size_t i = size_t(d) * weights.size() / size_t(p.D);
      const auto like = [&](const void* w) -> void* {
        if (!w) return nullptr;
        py::array array(type, Shape(weights[i].shape(), weights[i].shape() + weights[i].ndim()));
        i++;
        dweights.append(array);
        return array.mutable_data();
      };
      const auto& w = p.w[d];
      bwd.dw[d] = {like(w.w_ih), like(w.w_hh), like(w.b_ih), like(w.b_hh), like(w.w_hr)};
    }
    results["dweights"] = dweights;
  }

  template <class Params>
  py::dict run(void (*kernel)(const Params&), const Params& params) {
    for (const auto& unknown : left)
      throw py::type_error("unexpected argument: " + std::string(py::str(unknown.first)));
    {
      py::gil_scoped_release release;
      kernel(params);
    }
    return results;
  }

 private:
  std::optional<py::array> optional(const char* name) {
    const py::object value = left.attr("pop")(name, py::none());
    if (value.is_none()) return std::nullopt;
    return py::cast<py::array>(value);
  }
  py::array required(const char* name) {
    if (auto array = optional(name)) return *array;
    throw py::type_error("missing argument: " + std::string(name));
  }
  const void* checked(const char* name, const py::array& array, const py::dtype& dtype, const Shape& shape) {
    const bool as_expected = array.dtype().equal(dtype) && (array.flags() & py::array::c_style) &&
                             Shape(array.shape(), array.shape() + array.ndim()) == shape;
    if (!as_expected)
      throw std::invalid_argument(std::string(name) + ": expected contiguous " +
                                  std::string(py::str(py::object(dtype))) + " of shape " +
                                  std::string(py::str(py::tuple(py::cast(shape)))) + ", got " +
                                  std::string(py::str(py::object(array.dtype()))) + " of shape " +
                                  std::string(py::str(array.attr("shape"))));
    arrays.push_back(array);
    return array.data();
  }
  static void run_on_threads(void*, int64_t n, void (*body)(void*, int64_t, int64_t), void* arg) {
    std::vector<std::thread> others;
    for (int64_t i = 1; i < n; i++) others.emplace_back(body, arg, i, i + 1);
    body(arg, 0, 1);
    for (auto& thread : others) thread.join();
  }

  sk::LayerParams& p;
  py::kwargs left;  // arguments that nobody has asked for yet
  py::dtype type;
  Shape tokens;                            // leading dimensions of what has one row per token
  std::vector<py::array> weights, arrays;  // kept alive while the kernel runs
  py::dict results;
};

py::dict lstm_fwd(py::kwargs arguments) {
  sk::LstmFwdParams p;
  Call call(p, 4, std::move(arguments));
  call.outputs(p, true);
  p.c0 = call.in("c0", call.cell_state()), p.cn = call.out("cn", call.cell_state());
  p.cells = call.out("cells", call.per_token(p.H));
  return call.run(sk::lstm_fwd, p);
}

py::dict lstm_bwd(py::kwargs arguments) {
  sk::LstmBwdParams p;
  Call call(p, 4, std::move(arguments));
  call.gradients(p, true);
  p.c0 = call.in("c0", call.cell_state()), p.cells = call.in("cells", call.per_token(p.H));
  p.dcn = call.in_or_null("dcn", call.cell_state()),
  p.dcells = call.in_or_null("dcells", call.per_token(p.H));
  p.dc0 = call.out("dc0", call.cell_state());
  return call.run(sk::lstm_bwd, p);
}

py::dict gru_fwd(py::kwargs arguments) {
  sk::GruFwdParams p;
  Call call(p, 3, std::move(arguments));
  call.outputs(p, true);
  return call.run(sk::gru_fwd, p);
}

py::dict gru_bwd(py::kwargs arguments) {
  sk::GruBwdParams p;
  Call call(p, 3, std::move(arguments));
  call.gradients(p, true);
  return call.run(sk::gru_bwd, p);
}

py::dict rnn_fwd(py::kwargs arguments) {
  sk::RnnFwdParams p;
  Call call(p, 1, std::move(arguments));
  call.outputs(p, false);
  p.relu = call.argument("relu", false);
  return call.run(sk::rnn_fwd, p);
}

py::dict rnn_bwd(py::kwargs arguments) {
  sk::RnnBwdParams p;
  Call call(p, 1, std::move(arguments));
  call.gradients(p, false);
  p.relu = call.argument("relu", false);
  return call.run(sk::rnn_bwd, p);
}

}  // namespace

PYBIND11_MODULE(_kernels, m) {
  m.doc() = R"(Torch-free view of the CPU kernels: instruction sets, FMA peak, vector functions, layers.

Layers take named NumPy arrays, all float32 or all float64, and return new ones in a dict. D directions, P = H
without projection; N tokens are [T, B], or with batch_sizes (int64 [T]) one dimension.
  *_fwd: x [N, I], h0 [D, B, P], weights [w_ih, w_hh (, b_ih, b_hh) (, w_hr)] * D -> y [N, D*P], hn, gates
  *_bwd: the same and y (, gates) (, dy) (, dhn) -> dx, dh0, dweights
  LSTM:  also c0 [D, B, H] -> cn, cells [N, D*H]; backward c0, cells (, dcn) (, dcells) -> dc0
Optional: batch_sizes, resets (bool [T, B]), threads=1, save_gates=True (LSTM, GRU), relu=False (RNN).)";
  m.def("supported_isas", &supported_isas,
        "Instruction sets that this build and machine support, slowest first.");
  m.def("active_isa", [] { return sk::isa_name(sk::active_isa()); });
  m.def("force_isa", [](const std::string& name) { sk::force_isa(name.c_str()); }, py::arg("name"));
  m.def(
      "fma_peak", &fma_peak, py::arg("dtype"), py::arg("threads"),
      "Multiply-adds on registers alone, in GF/s: the roof over every kernel of the active instruction set.");
  m.def("lstm_fwd", &lstm_fwd), m.def("lstm_bwd", &lstm_bwd);
  m.def("gru_fwd", &gru_fwd), m.def("gru_bwd", &gru_bwd);
  m.def("rnn_fwd", &rnn_fwd), m.def("rnn_bwd", &rnn_bwd);
  for (int f = 0; f < 2; f++) {
    const char* name = f == 0 ? "sigmoid" : "tanh";
    m.def(name,
          [f](const py::array_t<float, py::array::c_style>& x) { return activation(f, sk::DType::f32, x); });
    m.def(name,
          [f](const py::array_t<double, py::array::c_style>& x) { return activation(f, sk::DType::f64, x); });
  }
}
