// baseline: see kernels.inl.h. Compiled with its own flags (CMakeLists.txt); everything but the table has
// internal linkage.
#include <sched.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "table.h"

#define SEQKERNELS_VEC_BYTES 16

namespace seqkernels {
namespace {
#include "kernels.inl.h"
}  // namespace

const KernelTable& kernels_baseline() { return kTable; }

}  // namespace seqkernels
