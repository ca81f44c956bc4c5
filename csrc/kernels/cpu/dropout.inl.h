// Which weights of attention dropout leaves, by Philox 4x32-7 (Salmon et al. 2011): backward draws again what
// forward drew, and nothing of Tq x Tk lies in memory.
//
// Counter: (key / 4, query ^ upper half of the offset, sequence and head, lower half of the offset), one
// number for each of four neighbouring keys, as on GPUs (seqkernels/triton/common.py). A lane of 64 bits has
// one counter, because there one multiplication gives both halves of a product; what stands above a half is
// never read. 32 keys of a query take some 75 instructions with AVX-512, 42 of them the rounds.
#pragma once

#include "vec.h"

using U64 = Vec<uint64_t>;

// The product of the lower halves.
SEQ_INLINE U64 multiply_halves(U64 a, uint32_t b) {
#if defined(__AVX512F__)
  return (U64)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)splat(uint64_t(b)));
#elif defined(__AVX2__)
  return (U64)_mm256_mul_epu32((__m256i)a, (__m256i)splat(uint64_t(b)));
#else
  return (a & 0xffffffff) * uint64_t(b);
#endif
}

struct Philox {
  static constexpr int kRounds = 7, kLane = kLanes<uint64_t>;

  const Dropout& drop;
  U64 keys[kRounds][2];

  explicit Philox(const Dropout& dropout) : drop(dropout) {
    for (uint32_t round = 0; round < kRounds; round++) {
      keys[round][0] = splat(uint64_t(uint32_t(drop.seed) + round * 0x9e3779b9));
      keys[round][1] = splat(uint64_t(uint32_t(drop.seed >> 32) + round * 0xbb67ae85));
    }
  }

  // Bit n: key j + n, of 32, stays for query i of head h of sequence b, `head` being b Hq + h. 32 divides j.
  uint32_t kept(int64_t head, int64_t i, int64_t j) const {
    U64 bits{};
    SEQ_UNROLL for (int first = 0; first < 8; first += kLane) {
      U64 quad;
      SEQ_UNROLL for (int lane = 0; lane < kLane; lane++) quad[lane] = uint64_t(first + lane);
      U64 c[4] = {quad + uint64_t(j / 4), splat(uint64_t(i) ^ drop.offset >> 32), splat(uint64_t(head)),
                  splat(drop.offset)};
      SEQ_UNROLL for (int round = 0; round < kRounds; round++) {
        const U64 a = multiply_halves(c[0], 0xd2511f53), b = multiply_halves(c[2], 0xcd9e8d57);
        c[0] = b >> 32 ^ c[1] ^ keys[round][0], c[1] = b;
        c[2] = a >> 32 ^ c[3] ^ keys[round][1], c[3] = a;
      }
      SEQ_UNROLL for (int n = 0; n < 4; n++) {
        const U64 stays = (U64)(c[n] << 32 >= splat(drop.threshold << 32));
        bits |= (stays & (uint64_t(1) << n)) << quad * 4;
      }
    }
    return uint32_t(reduce_lanes<uint64_t>(bits, [](U64 a, U64 b) { return a | b; }));
  }
};
