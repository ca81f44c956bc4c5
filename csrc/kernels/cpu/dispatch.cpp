// Which instruction sets this processor and its system support, and which one is chosen.
#include "kernels/cpu/dispatch.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace seqkernels {

const KernelTable& kernels_baseline();
const KernelTable& kernels_avx2();
const KernelTable& kernels_avx512();
const KernelTable& kernels_avx512_bf16();
const KernelTable& kernels_amx();

namespace {

#if defined(__x86_64__)

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  // Leaves zeros for a leaf that does not exist.
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

constexpr bool has(uint32_t reg, std::initializer_list<int> bits) {
  for (int bit : bits) {
    if (!(reg >> bit & 1)) return false;
  }
  return true;
}

// Which register files the operating system saves at a context switch (XCR0). xgetbv is written as assembly
// because the intrinsic needs -mxsave.
uint32_t os_saved_state() {
  uint32_t eax, edx;
  __asm__("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return eax;
}

// Linux gives the large AMX tile state only to processes that ask for it.
bool request_amx() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// The highest level for which all instructions that our flags allow the compiler (CMakeLists.txt) are there.
Isa probe() {
  const Registers leaf1 = cpuid(1, 0), leaf7 = cpuid(7, 0), leaf7_1 = cpuid(7, 1);
  if (!has(leaf1.ecx, {27})) return Isa::baseline;  // osxsave: without it there is no xgetbv
  const uint32_t saved = os_saved_state();
  const bool avx2 =
      has(leaf1.ecx, {12, 28, 29}) /* fma, avx, f16c */ && has(leaf7.ebx, {5}) && has(saved, {1, 2});
  if (!avx2) return Isa::baseline;
  const bool avx512 = has(leaf7.ebx, {16, 17, 30, 31}) /* f, dq, bw, vl */ && has(saved, {5, 6, 7});
  if (!avx512) return Isa::avx2;
  if (!has(leaf7_1.eax, {5})) return Isa::avx512;
  const bool amx = has(leaf7.edx, {22, 24}) /* bf16, tile */ && has(saved, {17, 18}) && request_amx();
  return amx ? Isa::amx : Isa::avx512_bf16;
}

#else

Isa probe() { return Isa::baseline; }

#endif

const KernelTable& table(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2:
      return kernels_avx2();
    case Isa::avx512:
      return kernels_avx512();
    case Isa::avx512_bf16:
      return kernels_avx512_bf16();
    case Isa::amx:
      return kernels_amx();
#endif
    default:
      return kernels_baseline();
  }
}

Isa best_isa() {
  static const Isa best = probe();
  return best;
}

Isa parse_isa(std::string_view name, const char* setter) {
  std::string supported;
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!isa_supported(isa)) continue;
    if (name == isa_name(isa)) return isa;
    supported += supported.empty() ? isa_name(isa) : std::string(", ") + isa_name(isa);
  }
  throw std::invalid_argument(std::string("seqkernels: ") + setter + ": got \"" + std::string(name) +
                              "\", expected an instruction set that this machine supports: " + supported);
}

Isa initial_isa() {
  if (const char* name = std::getenv("SEQKERNELS_CPU_ISA"); name && *name)
    return parse_isa(name, "SEQKERNELS_CPU_ISA");
  return best_isa();
}

std::atomic<Isa>& active() {
  static std::atomic<Isa> isa{initial_isa()};
  return isa;
}

}  // namespace

bool isa_supported(Isa isa) { return isa <= best_isa(); }

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::amx:
      return "amx";
    default:
#if defined(__aarch64__)
      return "neon";
#else
      return "baseline";
#endif
  }
}

Isa active_isa() { return active().load(std::memory_order_relaxed); }

void force_isa(const char* name) { active().store(parse_isa(name, "force_isa"), std::memory_order_relaxed); }

const KernelTable& kernels(DType dtype) {
  const Isa isa = active_isa();
  return table(dtype == DType::bf16 ? isa : std::min(isa, Isa::avx512));  // what comes after adds bf16 alone
}

}  // namespace seqkernels
