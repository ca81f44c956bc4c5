// amx: see kernels.inl.h. Compiled with its own flags (CMakeLists.txt); everything but the table has internal
// linkage.
#include <immintrin.h>
#include <sched.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "table.h"

#define SEQKERNELS_VEC_BYTES 64

namespace seqkernels {
namespace {
#include "kernels.inl.h"
}  // namespace

const KernelTable& kernels_amx() { return kTable; }

}  // namespace seqkernels
