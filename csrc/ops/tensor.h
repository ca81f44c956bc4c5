// What every binding needs: names, shapes and element types of tensors, and torch's threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels/memory.h"
#include "kernels/parallel.h"
#include "kernels/types.h"

namespace seqkernels::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

std::string text(Shape shape);
std::string text(ScalarType type);
std::string text(const Tensor& t);  // "float32 [2, 3] on cpu"
// Of a tensor that has to be float32, float64, bfloat16 or float16.
DType dtype_of(const char* op, const char* name, const Tensor& t);
ScalarType accumulation_type(DType dtype);  // float32, or float64 where that is the dtype

bool same_device(const Tensor& a, const Tensor& b);
// An error, unless t has that type and shape and is on the device of `like`. Allocates nothing where it is
// so: a step of one row, which takes microseconds, asks seven times.
void expect(const char* op, const Tensor& t, const char* name, ScalarType type, Shape shape,
            const Tensor& like);

// Kernels read features, and small tensors as a whole, as they lie: what lies otherwise is replaced by a
// copy. An exported program meets such tensors, as no Python looks at them there.
void lay_contiguously(Tensor& t);
void lay_last_dimension(Tensor& t);

// torch's threads behind the kernels' interface.
Parallel torch_threads();

// How a contiguous tensor lies in memory; nothing if its elements are too many to count.
struct Extent {
  std::vector<int64_t> strides;
  int64_t numel = 1;
};
std::optional<Extent> contiguous(Shape sizes);

// An uninitialised contiguous tensor of the device and (unless given) dtype of `t`. stable::new_empty looks
// its operator up by name: 1 us an output, which shows in a step of one row.
Tensor empty(const Tensor& t, Shape sizes, std::optional<ScalarType> dtype = std::nullopt);

// Like empty(), for CPU tensors with one row per token or weight: large ones ask for huge pages. Fresh memory
// costs 0.4 ms a MiB in pages of 4 KiB (Zen 5 in a virtual machine) and 0.05 ms in huge ones; a training step
// spent 13 % in page faults.
Tensor large_empty(const Tensor& t, Shape sizes, std::optional<ScalarType> dtype = std::nullopt);

// For what a training step frees and the next one needs again, activations saved for backward and gradients
// of weights: large ones that are freed are kept (kernels/memory.h). Fresh memory cost 4 % of a step where it
// is cheap, and a third where a hypervisor had taken it meanwhile.
Tensor kept_empty(const Tensor& t, Shape sizes);

// A size-0 tensor where an output is not wanted: the arity of an op never changes.
Tensor none_like(const Tensor& t, std::optional<ScalarType> dtype = std::nullopt);

// Registers a kernel for both schemas of a forward op (library.cpp).
template <class Box>
void impl_forward(torch::stable::detail::StableLibrary& m, const std::string& name, Box box) {
  m.impl(name.c_str(), box);
  m.impl((name + ".exported").c_str(), box);
}

}  // namespace seqkernels::ops
