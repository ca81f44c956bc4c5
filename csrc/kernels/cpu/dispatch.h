// Which instruction set the kernels run with: the best one that this machine supports, or the one that
// SEQKERNELS_CPU_ISA names. One binary runs everywhere; the choice is made when the program runs.
#pragma once

#include "../types.h"

namespace seqkernels {

struct KernelTable;  // table.h

// In order of preference; each one includes those before it. On Arm `baseline` is NEON and is printed as
// "neon".
enum class Isa { baseline, avx2, avx512, avx512_bf16, amx };
inline constexpr int kIsaCount = 5;

// True when processor and operating system can run it. The first call of any function here asks Linux for the
// permission to use AMX's tile registers, where there are any.
bool isa_supported(Isa isa);
const char* isa_name(Isa isa);

// SEQKERNELS_CPU_ISA, or the best supported; decided at the first call. Throws std::invalid_argument, with
// what it got and what it expected, when the variable names an instruction set that is unknown or not
// supported here.
Isa active_isa();

// Changes the active instruction set of this library from now on (for tests). Not while a kernel runs.
// Throws std::invalid_argument as above.
void force_isa(const char* name);

// The kernels of the active instruction set for this storage type.
const KernelTable& kernels(DType dtype);

}  // namespace seqkernels
