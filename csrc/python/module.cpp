// seqkernels._kernels: what tests and reports need of the kernels without torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>
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
  const auto run = [type](int64_t n) { return sk::kernels().fma_peak(type, n); };
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
  sk::kernels().activation(f, dtype, x.data(), y.mutable_data(), x.size());
  return y;
}

}  // namespace

PYBIND11_MODULE(_kernels, m) {
  m.doc() = "Torch-free view of the CPU kernels: instruction sets, FMA peak, vector functions.";
  m.def("supported_isas", &supported_isas,
        "Instruction sets that this build and machine support, slowest first.");
  m.def("active_isa", [] { return sk::isa_name(sk::active_isa()); });
  m.def("force_isa", [](const std::string& name) { sk::force_isa(name.c_str()); }, py::arg("name"));
  m.def(
      "fma_peak", &fma_peak, py::arg("dtype"), py::arg("threads"),
      "Multiply-adds on registers alone, in GF/s: the roof over every kernel of the active instruction set.");
  for (int f = 0; f < 2; f++) {
    const char* name = f == 0 ? "sigmoid" : "tanh";
    m.def(name,
          [f](const py::array_t<float, py::array::c_style>& x) { return activation(f, sk::DType::f32, x); });
    m.def(name,
          [f](const py::array_t<double, py::array::c_style>& x) { return activation(f, sk::DType::f64, x); });
  }
}
