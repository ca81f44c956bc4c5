// How much freed memory the process keeps for the next call, of each kind: scratch (cpu/entry.cpp), saved
// activations and gradients (ops/kept.cpp). Beyond kUnmarked the system may take it back meanwhile.
#pragma once

#include <cstddef>

namespace seqkernels {

constexpr std::size_t kHugePage = std::size_t(2) << 20, kMostKept = std::size_t(256) << 20,
                      kUnmarked = std::size_t(64) << 20;

}  // namespace seqkernels
