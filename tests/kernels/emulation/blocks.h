// As much of CUDA as `selection_lists.cuh` uses, for a CPU: a block's threads are threads, its barriers are barriers, and a warp's
// shuffles are exchanges between two of them. Needs C++20.

#pragma once

#include <stdint.h>

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __forceinline__ inline
using std::max;
using std::min;

struct int2 {
  int x, y;
};
inline int2 make_int2(int x, int y) { return {x, y}; }

struct Index {
  int x;
};
inline thread_local Index threadIdx;

struct Warp {
  std::barrier<> barrier{32};
  uint32_t values[32];
};
inline std::unique_ptr<std::barrier<>> block_barrier;
inline std::vector<std::unique_ptr<std::barrier<>>> group_barriers;
inline std::vector<std::unique_ptr<Warp>> warps;

inline void __syncthreads() { block_barrier->arrive_and_wait(); }

// What every lane gives, in order.
template <typename Use>
uint32_t exchanged(uint32_t value, Use use) {
  Warp& warp = *warps[threadIdx.x / 32];
  warp.values[threadIdx.x % 32] = value;
  warp.barrier.arrive_and_wait();
  const uint32_t result = use(warp.values);
  warp.barrier.arrive_and_wait();
  return result;
}

inline int __shfl_up_sync(uint32_t, int value, int distance) {
  const int lane = threadIdx.x % 32;
  return (int)exchanged((uint32_t)value, [&](const uint32_t* all) { return all[lane >= distance ? lane - distance : lane]; });
}
inline uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
  return exchanged(value, [](const uint32_t* all) { return *std::max_element(all, all + 32); });
}
inline int __reduce_max_sync(uint32_t mask, int value) { return (int)__reduce_max_sync(mask, (uint32_t)value); }
inline uint32_t __reduce_min_sync(uint32_t, uint32_t value) {
  return exchanged(value, [](const uint32_t* all) { return *std::min_element(all, all + 32); });
}
inline int __reduce_add_sync(uint32_t, int value) {
  return (int)exchanged((uint32_t)value, [](const uint32_t* all) {
    uint32_t sum = 0;
    for (int lane = 0; lane < 32; ++lane) sum += all[lane];
    return sum;
  });
}

template <typename To, typename From>
To bits_of(From value) {
  To result;
  memcpy(&result, &value, sizeof result);
  return result;
}
inline int __float_as_int(float value) { return bits_of<int>(value); }
inline uint32_t __float_as_uint(float value) { return bits_of<uint32_t>(value); }
inline float __int_as_float(int value) { return bits_of<float>(value); }
inline float __uint_as_float(uint32_t value) { return bits_of<float>(value); }
inline int __clz(uint32_t value) { return value ? __builtin_clz(value) : 32; }
inline int __popc(uint32_t value) { return __builtin_popcount(value); }
inline int __ffs(uint32_t value) { return __builtin_ffs((int)value); }
template <typename Value>
Value __ldcg(const Value* from) {
  return *from;
}
template <typename Value>
Value atomicAdd(Value* to, Value value) {
  return __atomic_fetch_add(to, value, __ATOMIC_SEQ_CST);
}
inline void atomicOr(uint32_t* to, uint32_t value) { __atomic_fetch_or(to, value, __ATOMIC_SEQ_CST); }

// Runs body() in every thread of a block that has groups of 128.
template <typename Body>
void run_block(int num_threads, Body body) {
  block_barrier = std::make_unique<std::barrier<>>(num_threads);
  group_barriers.clear();
  warps.clear();
  for (int i = 0; i < num_threads / 128; ++i) group_barriers.push_back(std::make_unique<std::barrier<>>(128));
  for (int i = 0; i < num_threads / 32; ++i) warps.push_back(std::make_unique<Warp>());
  std::vector<std::thread> threads;
  for (int i = 0; i < num_threads; ++i) threads.emplace_back([=] {
    threadIdx.x = i;
    body();
  });
  for (std::thread& thread : threads) thread.join();
}
