// Unions of the lists of 16 neighbouring queries for sm_90a: one block makes one tile's, in shared memory.
//
// A bitmap of the keys that any list names is counted through, which gives every key its place in the union; then each list
// sets its query's bit in the masks at those places. Lists are read twice, the second time from the L2 cache. Larger contexts
// than the bitmap go through in spans, in ascending order. Nothing depends on the order in which threads come: the same bits
// on every run.

#include <cuda_runtime.h>
#include <stdint.h>

namespace {

constexpr int kTile = 16;
constexpr int kThreads = kTile * 32;           // a warp for each list
constexpr int kSpan = 262144;                  // keys of the bitmap
constexpr int kWords = kSpan / 32;
constexpr int kQuads = kWords / 4 / kThreads;  // of 4 words, that one thread counts
constexpr int kMostPicked = 4096;              // places in a union are kept in 16 bits
constexpr uint32_t kAll = 0xffffffffu;

struct Shared {
  alignas(16) uint32_t bitmap[kWords];
  alignas(16) uint16_t place[kWords];          // of the first key of a word, within the span
  int sums[kTile];
  alignas(16) uint32_t masks[4];               // two to a word; goes on for as many as a union has room
};

// Calls use(key) for the entries of a list, the lanes of a warp side by side. kAtOnce: entries per load.
template <int kAtOnce, typename Use>
__device__ __forceinline__ void for_entries(const int* list, int num_picked, Use use) {
#pragma unroll 4
  for (int i = threadIdx.x % 32 * kAtOnce; i < num_picked; i += 32 * kAtOnce) {
    if constexpr (kAtOnce == 4) {
      const int4 keys = *reinterpret_cast<const int4*>(list + i);
      use(keys.x), use(keys.y), use(keys.z), use(keys.w);
    } else {
      use(list[i]);
    }
  }
}

// For every word of the bitmap, how many keys are in the words before it. Returns how many there are in all.
__device__ __forceinline__ int count_through(Shared& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint4* bitmap = reinterpret_cast<const uint4*>(shared.bitmap) + threadIdx.x * kQuads;
  int own[kQuads][4], all_own = 0;
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    const uint4 words = bitmap[i];
    own[i][0] = __popc(words.x), own[i][1] = __popc(words.y), own[i][2] = __popc(words.z), own[i][3] = __popc(words.w);
    all_own += own[i][0] + own[i][1] + own[i][2] + own[i][3];
  }
  int up_to_own = all_own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAll, up_to_own, step);
    if (lane >= step) up_to_own += other;
  }
  if (lane == 31) shared.sums[warp] = up_to_own;
  __syncthreads();
  const int its_sum = lane < kTile ? shared.sums[lane] : 0;
  int place = up_to_own - all_own + __reduce_add_sync(kAll, lane < warp ? its_sum : 0);
  ushort4* places = reinterpret_cast<ushort4*>(shared.place) + threadIdx.x * kQuads;
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    const int second = place + own[i][0], third = second + own[i][1], fourth = third + own[i][2];
    places[i] = ushort4{static_cast<uint16_t>(place), static_cast<uint16_t>(second), static_cast<uint16_t>(third),
                        static_cast<uint16_t>(fourth)};
    place = fourth + own[i][3];
  }
  return __reduce_add_sync(kAll, its_sum);
}

template <int kAtOnce>
__global__ void __launch_bounds__(kThreads, 2)
    unions_kernel(const int* indices, int* keys, int* masks, int* counts, int num_queries, int num_picked, long long row_stride,
                  int num_keys, int room) {
  extern __shared__ uint8_t memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int tile = blockIdx.x, thread = threadIdx.x, row = thread / 32;
  const int query = tile * kTile + row;
  const int* list = indices + query * row_stride;
  const int num_entries = query < num_queries ? num_picked : 0;
  keys += static_cast<long long>(tile) * room;
  masks += static_cast<long long>(tile) * room;
  int count = 0;
  for (int low = 0; low < num_keys; low += kSpan) {
    const uint32_t span = min(kSpan, num_keys - low);
    for (int i = thread; i < kWords / 4; i += kThreads) reinterpret_cast<uint4*>(shared.bitmap)[i] = uint4{0, 0, 0, 0};
    for (int i = thread; i < (room + 1) / 2; i += kThreads) shared.masks[i] = 0;
    __syncthreads();
    for_entries<kAtOnce>(list, num_entries, [&](int key) {
      const uint32_t at = key - low;
      if (key >= low && at < span) atomicOr(&shared.bitmap[at / 32], 1u << at % 32);
    });
    __syncthreads();
    const int num_here = count_through(shared);
    __syncthreads();
    for_entries<kAtOnce>(list, num_entries, [&](int key) {
      const uint32_t at = key - low;
      if (key >= low && at < span) {
        const int place = shared.place[at / 32] + __popc(shared.bitmap[at / 32] & ((1u << at % 32) - 1));
        atomicOr(&shared.masks[place / 2], 1u << (row + place % 2 * 16));
      }
    });
    // Neighbouring threads take neighbouring words, so that what a warp writes lies together.
    for (uint32_t word = thread; word * 32 < span; word += kThreads) {
      uint32_t bits = shared.bitmap[word];
      for (int to = count + shared.place[word]; bits; bits &= bits - 1) keys[to++] = low + static_cast<int>(word) * 32 + __ffs(bits) - 1;
    }
    __syncthreads();
    for (int i = thread; i < num_here; i += kThreads) masks[count + i] = shared.masks[i / 2] >> (i % 2 * 16) & 0xffff;
    count += num_here;
    __syncthreads();
  }
  if (thread == 0) counts[tile] = count;
}

}  // namespace

// indices [T, num_picked] below num_keys, -1 for none, rows row_stride apart; keys and masks [N, room], counts [N].
extern "C" int unions_build(const int* indices, int* keys, int* masks, int* counts, int num_queries, int num_picked,
                            long long row_stride, int num_keys, int room, cudaStream_t stream) {
  const int num_tiles = (num_queries + kTile - 1) / kTile;
  if (num_tiles == 0) return cudaSuccess;
  if (num_picked > kMostPicked) return cudaErrorInvalidValue;
  const bool is_aligned = num_picked % 4 == 0 && row_stride % 4 == 0 && reinterpret_cast<uintptr_t>(indices) % 16 == 0;
  const auto kernel = is_aligned ? unions_kernel<4> : unions_kernel<1>;
  const int bytes = sizeof(Shared) + room * 2;
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  kernel<<<num_tiles, kThreads, bytes, stream>>>(indices, keys, masks, counts, num_queries, num_picked, row_stride, num_keys, room);
  return cudaGetLastError();
}
