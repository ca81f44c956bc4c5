// How blocks of work are shared out among threads that are not equally fast.
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <sched.h>

#include <utility>

#include "support.h"

#define SEQKERNELS_VEC_BYTES 16

#pragma GCC diagnostic ignored "-Wunused-function"  // of what else is in the header

namespace seqkernels::test {
namespace {

#include "kernels/cpu/team.inl.h"

struct Team {
  int64_t blocks;
  std::vector<double> block_ticks;  // of each thread

  std::string text() const {
    std::string text = std::to_string(blocks) + " blocks, ticks";
    for (const double t : block_ticks) text += " " + std::to_string(t);
    return text;
  }
};

// Shares after `rounds` rounds in which every thread takes its ticks for each block.
std::vector<int64_t> shares_of(const Team& team, int rounds) {
  const int size = int(team.block_ticks.size());
  std::vector<Shares::Busy> busy(size_t(size), Shares::Busy{});
  std::vector<std::vector<int64_t>> memory(size_t(size), std::vector<int64_t>(size_t(2 * size + 1)));
  std::vector<Shares> threads;
  for (int i = 0; i < size; i++) {
    int64_t* own = memory[size_t(i)].data();
    threads.push_back({busy.data(), own, own + size + 1, size, i});
    threads.back().begin(team.blocks);
  }
  for (int round = 0; round < rounds; round++) {
    for (int i = 0; i < size; i++) {
      const Shares& s = threads[size_t(i)];
      busy[size_t(i)].ticks[s.turn] =
          int64_t(double(s.first[i + 1] - s.first[i]) * team.block_ticks[size_t(i)]);
    }
    for (Shares& s : threads) s.share_anew();
  }
  std::vector<int64_t> shares;
  for (int i = 0; i < size; i++) shares.push_back(threads[0].first[i + 1] - threads[0].first[i]);
  for (const auto& own : memory)
    if (!std::equal(own.begin(), own.begin() + size + 1, memory[0].begin()))
      fail("threads disagree about their shares", team);
  return shares;
}

}  // namespace

void check_shares() {
  const auto expect = [](const Team& team, const std::vector<int64_t>& shares) {
    for (const int rounds : {1, 2, 5}) {
      calls++;
      if (shares_of(team, rounds) != shares) fail("shares", team);
    }
  };
  expect({8, {1000, 1000}}, {4, 4});
  expect({8, {1000, 1040}}, {4, 4});  // not worth it
  expect({8, {1000, 1500}}, {5, 3});
  expect({8, {1500, 1000}}, {3, 5});
  expect({8, {1000, 9000}}, {6, 2});  // buffers hold half as much again as an equal share
  expect({7, {1000, 1000}}, {3, 4});
  expect({2, {1000, 9000}}, {1, 1});
  expect({3, {1000, 1000, 5000}}, {1, 1, 1});
  expect({16, {1000, 1000, 2000, 1000}}, {5, 5, 2, 4});
  expect({1, {1000}}, {1});
}

}  // namespace seqkernels::test
