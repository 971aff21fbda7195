// The lightning indexer's selection for sm_90a: scores in fp8 and exact top-k, no matrix of scores anywhere. Five kernels:
// the keys are arranged, a sample of them is scored, thresholds come of it, all keys are scored, the best are written.
//
// A block owns 16 neighbouring queries. Their 16 x 16 heads are the columns of two wgmma tiles and stay in shared memory;
// the warpgroups take turns at stages of 256 keys. While one half of the queries is multiplied with a tile of keys, the
// products of the other half are weighed, summed and compared. The rows of the column operand are ordered so that all heads of
// a query fall to one thread: that needs no exchange between threads.
//
// Keys are arranged in the order in which wgmma reads shared memory, so that a stage is one bulk copy, and the sample is drawn,
// one of every `stride`.
//
// Instead of writing scores, a row keeps what may still be among its k best. The scores of the sample give each
// row a threshold that some k + margin keys are expected to pass; keys that pass are appended to the row's list. A list that
// fills up is pruned to its k best and the threshold rises to the k-th of them; a list that ends with fewer than k keys (an
// unlucky sample) is made again without a threshold. So the result is exact whatever the scores are, and only its speed
// depends on the sample.
//
// A row's list has a strand for each of the 96 threads that meet its scores, so that appending needs no atomic and no branch:
// a store and an addition under a predicate. `selection_lists.cuh` prunes lists and chooses from them.

#include <cuda_runtime.h>
#include <stdint.h>

namespace {

__device__ __forceinline__ void group_barrier(int group);

}  // namespace

#include "selection_lists.cuh"

namespace {

constexpr int kTile = 16;                  // queries of a block
constexpr int kHeads = 16;
constexpr int kWidth = 64;                 // bytes of a vector in e4m3
constexpr int kHalf = kTile / 2;           // queries of a wgmma tile
constexpr int kColumns = kHalf * kHeads;   // of it
constexpr int kProducts = kColumns / 2;    // a thread's share of a wgmma tile
constexpr int kKeys = 64;                  // rows of the wgmma tile
constexpr int kStageKeys = 256;
constexpr int kStageTiles = kStageKeys / kKeys;
constexpr int kStageBytes = kStageKeys * (kWidth + 4);
constexpr int kThreads = kGroups * kGroupThreads;
constexpr int kStages = 3;
constexpr int kRound = 1;                  // stages of a warpgroup between two looks at the lists
constexpr int kFullAt = kSlots - kRound * (kStageKeys / kOwners);
constexpr int kNear = 8;                   // entries around the wanted one that a sample's threshold may be off
constexpr int kUsualSlots = 56;            // of the longest strand of most rows
constexpr int kSampled = 6144;             // keys of a sample at most: as many as a list holds without a threshold
constexpr int kSampleSlots = (kSampled / kStageKeys + kGroups - 1) / kGroups * (kStageKeys / kOwners);
constexpr int kMinStride = 16;             // of the sample: every 16th key costs a sixteenth of the work
constexpr int kPadding = 2 * kStageKeys;   // keys past the end that a stage may copy; none is ever chosen

constexpr float kLargest = 3.402823466e38f;

// The keys a pass scores: from `begin` on, a multiple of 8.
struct Pass {
  const uint8_t* keys;
  const float* scales;
  int begin;
  int number_from;                         // position of the first one, as entries name it
};

struct Stages {
  alignas(1024) uint8_t keys[kGroups][kStages][kStageKeys * kWidth];
  alignas(16) float scales[kGroups][kStages][kStageKeys];
};

struct Shared {
  alignas(1024) uint8_t query[2][kColumns * kWidth];
  Stages stages;
  alignas(8) uint64_t arrived[kGroups][kStages];
  alignas(16) float weights[2][kHalf * kHeads];
  alignas(16) float threshold[kTile];
  alignas(16) int first[kTile];
  alignas(16) int last[kTile];
  uint8_t count[kTile][kStrands];          // entries of every strand, once a pass has ended or a list is full
  int is_long[kTile];
  int needs_again;
  int begin, end;                          // between them some row sees a key
  int all_from, all_to;                    // and from here to there every row that selects
  Pass pass;
  GroupScratch group[kGroups];
};

static_assert(kMaxK <= kFullAt * kStrands / 2, "a pruned list must have room again");
static_assert(sizeof(Shared) <= 232448, "a block of sm_90 has 227 KiB of shared memory");

extern __shared__ __align__(1024) uint8_t block_memory[];

// By these names everywhere, so that the compiler knows the address space.
#define selector (*reinterpret_cast<SelectorMemory*>(block_memory))
#define shared (*reinterpret_cast<Shared*>(block_memory))

struct Arguments {
  const uint8_t* query;    // [T, 16, 64] e4m3
  const float* gates;      // [T, 16], times the query's scale
  const uint8_t* keys;     // [S + padding, 64] e4m3, arranged
  const float* scales;     // [S + padding]
  const uint8_t* sample;   // [S / stride + padding, 64], arranged
  const float* sample_scales;
  int stride, sample_rank;
  int is_sample;           // the lists are of the sample
  const void* first;       // [T] first visible key, or null for 0
  const void* last;        // [T] last visible key
  int are_wide;            // first and last are int64
  int num_queries, num_keys, k;
  int* out;                // [T, k]
  // Of the tiles that are dealt with together:
  int first_tile, num_tiles;
  uint8_t* lists;
  uint8_t* counts;         // [tiles, 16, strands]
  float* thresholds;       // [tiles, 16]
};

__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void copy_in_bulk(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
               "r"(bytes), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void expect_bytes(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void wait_for(uint32_t barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred arrived;\n"
      "again_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 arrived, [%0], %1;\n"
      "@arrived bra done_%=;\n"
      "bra again_%=;\n"
      "done_%=:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void publish_to_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void group_barrier(int group) {
  asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(kGroupThreads) : "memory");
}

// Rows of 64 bytes in the 64-byte swizzle: chunk c of row r lies at c ^ (r / 2 % 4); eight rows are 512 bytes.
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) { return row * kWidth + ((chunk ^ ((row >> 1) & 3)) << 4); }

__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
  return (uint64_t)((address & 0x3ffff) >> 4) | ((uint64_t)1 << 16) | ((uint64_t)(512 >> 4) << 32) | ((uint64_t)2 << 62);
}

// The same value in all threads of a warp, and known to be.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(~0u, value, 0); }

__device__ __forceinline__ int load_bound(const void* bounds, int are_wide, int row) {
  return are_wide ? (int)((const long long*)bounds)[row] : ((const int*)bounds)[row];
}

#define A8(b) "%" #b "0, %" #b "1, %" #b "2, %" #b "3, %" #b "4, %" #b "5, %" #b "6, %" #b "7, %" #b "8, %" #b "9, "
#define ACCUMULATORS "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " A8(1) A8(2) A8(3) A8(4) A8(5) "%60, %61, %62, %63"
#define D4(m, i) m(d[i]), m(d[i + 1]), m(d[i + 2]), m(d[i + 3])
#define D16(m, i) D4(m, i), D4(m, i + 4), D4(m, i + 8), D4(m, i + 12)
#define D64(m) D16(m, 0), D16(m, 16), D16(m, 32), D16(m, 48)
#define OUT(x) "=f"(x)
#define INOUT(x) "+f"(x)

// Starts d = keys . queries: [64, 128], width 64 in two steps of 32.
__device__ __forceinline__ void start_products(float (&d)[kProducts], uint64_t keys, uint64_t queries) {
  asm volatile(
      "{\n"
      "wgmma.fence.sync.aligned;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" ACCUMULATORS "}, %64, %65, 0, 1, 1;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" ACCUMULATORS "}, %66, %67, 1, 1, 1;\n"
      "wgmma.commit_group.sync.aligned;\n"
      "}\n"
      : D64(OUT)
      : "l"(keys), "l"(queries), "l"(keys + 2), "l"(queries + 2)
      : "memory");
}

// Waits until at most kPending of the products started last are unfinished; d is not among them.
template <int kPending>
__device__ __forceinline__ void finish_products(float (&d)[kProducts]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
  // Nothing may read the products before this point.
#pragma unroll
  for (int i = 0; i < kProducts; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Stages of a warpgroup, counted through all passes: which buffer, and which turn of its barrier.
__device__ __forceinline__ void load_stage(int group, uint32_t counted, int number) {
  const Pass& pass = shared.pass;
  const int stage = counted % kStages, start = pass.begin + number * kStageKeys;
  const uint32_t barrier = shared_address(&shared.arrived[group][stage]);
  expect_bytes(barrier, kStageBytes);
  copy_in_bulk(shared_address(shared.stages.keys[group][stage]), pass.keys + (int64_t)start * kWidth, kStageKeys * kWidth, barrier);
  copy_in_bulk(shared_address(shared.stages.scales[group][stage]), pass.scales + start, kStageKeys * 4, barrier);
}

// Where this thread appends: the byte offsets of its strands' ends, for the queries of `query_of`.
struct Strands {
  uint32_t end[4];
  __device__ __forceinline__ static int query_of(int thread, int a) { return (a >> 1) * kHalf + 2 * (thread & 3) + (a & 1); }
  __device__ __forceinline__ static uint32_t begin(int query, int group, int owner) {
    return ((query * kGroups + group) * kSlots) * kSlotBytes + owner * 8;
  }
  __device__ __forceinline__ static int owner(int thread) { return (thread >> 5) * 8 + ((thread & 31) >> 2); }
  __device__ __forceinline__ int count(int a, int group, int thread) const {
    return (int)(end[a] - begin(query_of(thread, a), group, owner(thread))) / kSlotBytes;
  }
  __device__ __forceinline__ void set_counts(int group, int thread) {
#pragma unroll
    for (int a = 0; a < 4; ++a) {
      const int query = query_of(thread, a), strand = group * kOwners + owner(thread);
      end[a] = begin(query, group, owner(thread)) + shared.count[query][strand] * kSlotBytes;
    }
  }
  __device__ __forceinline__ void publish_counts(int group, int thread) const {
#pragma unroll
    for (int a = 0; a < 4; ++a)
      shared.count[query_of(thread, a)][group * kOwners + owner(thread)] = (uint8_t)count(a, group, thread);
  }
  __device__ __forceinline__ bool is_one_full(int group, int thread) const {
    int most = 0;
#pragma unroll
    for (int a = 0; a < 4; ++a) most = max(most, count(a, group, thread));
    return most > kFullAt;
  }
};

// In predicated instructions: while products are under way the threads of a warp must not part.
__device__ __forceinline__ void append_if_passed(float score, float limit, int is_seen, int key, uint8_t* lists,
                                                 uint32_t& end) {
  asm volatile(
      "{\n"
      ".reg .pred seen, passed;\n"
      "setp.ne.s32 seen, %3, 0;\n"
      "setp.ge.and.f32 passed, %1, %2, seen;\n"
      "@passed st.global.v2.b32 [%5], {%4, %6};\n"
      "@passed add.u32 %0, %0, %7;\n"
      "}\n"
      : "+r"(end)
      : "f"(score), "f"(limit), "r"(is_seen), "r"(key), "l"(lists + end), "r"(__float_as_int(score)), "n"(kSlotBytes)
      : "memory");
}

// Sums over the heads and appends what passes. Thread layout of the products: rows (keys) lane / 4 and + 8 of the warp's 16,
// columns 8 i + 2 (lane % 4) + b, which hold query 2 (lane % 4) + i / 8 of the half and head 2 (i % 8) + b.
template <bool kIsEnd>
__device__ __forceinline__ void append(const float (&d)[kProducts], uint8_t* lists, Strands& strands, int half,
                                       const float* scales, int key, int thread) {
  const int quad = thread & 3, row = (thread >> 5) * 16 + ((thread & 31) >> 2);
  const float scale0 = scales[row], scale1 = scales[row + 8];
  const float4* weights = reinterpret_cast<const float4*>(shared.weights[half]);
  const float2 limits = *reinterpret_cast<const float2*>(&shared.threshold[half * kHalf + 2 * quad]);
#pragma unroll
  for (int a = 0; a < 2; ++a) {
    float sum0 = 0.0f, sum1 = 0.0f;
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const float4 w = weights[(a * 4 + part) * 4 + quad];
      const float each[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int head = part * 4 + e;
        const float x = d[(8 * a + head / 2) * 4 + (head & 1)], y = d[(8 * a + head / 2) * 4 + 2 + (head & 1)];
        // Twice the ReLU in one full-rate instruction; the weights are halved.
        sum0 = fmaf(x + fabsf(x), each[e], sum0);
        sum1 = fmaf(y + fabsf(y), each[e], sum1);
      }
    }
    const float limit = a ? limits.y : limits.x;
    uint32_t& end = strands.end[2 * half + a];
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      // A score that is no number ranks last: every row must end with k entries.
      const float score = fmaxf((below ? sum1 : sum0) * (below ? scale1 : scale0), -kLargest);
      const int mine = key + row + 8 * below, query = half * kHalf + 2 * quad + a;
      int is_seen = 1;
      if (kIsEnd) is_seen = mine >= shared.first[query] && mine <= shared.last[query];
      append_if_passed(score, limit, is_seen, mine, lists, end);
    }
  }
}

__device__ __noinline__ void load_queries(const Arguments& a, int tile) {
  for (int piece = threadIdx.x; piece < 2 * kColumns * 4; piece += kThreads) {
    const int half = piece / (kColumns * 4), row = piece / 4 % kColumns, chunk = piece & 3;
    const int query = half * kHalf + 2 * ((row & 7) >> 1) + (row >> 6), head = ((row >> 3) & 7) * 2 + (row & 1);
    const int token = tile * kTile + query;
    const bool is_there = token < a.num_queries;
    const int4* from = reinterpret_cast<const int4*>(a.query + ((int64_t)token * kHeads + head) * kWidth + chunk * 16);
    *reinterpret_cast<int4*>(shared.query[half] + swizzled(row, chunk)) = is_there ? *from : make_int4(0, 0, 0, 0);
  }
  for (int i = threadIdx.x; i < kTile * kHeads; i += kThreads) {
    const int query = i / kHeads, head = i % kHeads, token = tile * kTile + query;
    const float gate = token < a.num_queries ? a.gates[(int64_t)token * kHeads + head] : 0.0f;
    const int in_half = query % kHalf;
    shared.weights[query / kHalf][(((in_half & 1) * 4 + head / 4) * 4 + (in_half >> 1)) * 4 + (head & 3)] = 0.5f * gate;
  }
  if (threadIdx.x < kTile) {
    const int query = threadIdx.x, token = tile * kTile + query;
    const bool is_there = token < a.num_queries;
    const int last = is_there ? min(load_bound(a.last, a.are_wide, token), a.num_keys - 1) : -1;
    const int first = is_there && a.first ? load_bound(a.first, a.are_wide, token) : 0;
    shared.first[query] = first;
    shared.last[query] = last;
    shared.is_long[query] = last - first + 1 > a.k;
  }
  publish_to_wgmma();
  __syncthreads();
}

// Looks after the lists when a strand of the block is full; every thread of the block comes here.
__device__ __noinline__ void prune_full_lists(uint8_t* lists, int k) {
  const int group = threadIdx.x / kGroupThreads, thread = threadIdx.x % kGroupThreads;
  __syncthreads();
  for (int query = group; query < kTile; query += kGroups) {
    // A closed row's threshold is no number; its list is complete.
    const bool is_open = shared.threshold[query] <= __int_as_float(0x7f800000);
    if (is_open && view_list(nullptr, shared.count[query]).longest > kFullAt)
      prune(lists + query * kListBytes, shared.count[query], &shared.threshold[query], shared.group[group], group, thread, k);
  }
  __syncthreads();
}

__device__ __forceinline__ void begin_pass(const Pass& pass) {
  if (threadIdx.x == 0) shared.pass = pass;
  __syncthreads();
}

// The products of a stage: every tile of 64 keys with two halves of the queries. The next is under way while one is looked at.
__device__ __forceinline__ void score_stage(uint8_t* lists, Strands& strands, int group, int stage, int key, int thread) {
  const uint64_t keys = descriptor(shared_address(shared.stages.keys[group][stage]));
  const uint64_t queries = descriptor(shared_address(shared.query));
  constexpr int kApart = kKeys * kWidth / 16, kHalvesApart = kColumns * kWidth / 16;
  const float* scales = shared.stages.scales[group][stage];
  float even[kProducts], odd[kProducts];
  start_products(even, keys, queries);
#pragma unroll
  for (int tile = 0; tile < kStageTiles; ++tile) {
    start_products(odd, keys + tile * kApart, queries + kHalvesApart);
    finish_products<1>(even);
    append<false>(even, lists, strands, 0, scales + tile * kKeys, key + tile * kKeys, thread);
    if (tile + 1 < kStageTiles) {
      start_products(even, keys + (tile + 1) * kApart, queries);
      finish_products<1>(odd);
    } else {
      finish_products<0>(odd);
    }
    append<false>(odd, lists, strands, 1, scales + tile * kKeys, key + tile * kKeys, thread);
  }
}

// The same for a stage that not every row sees whole, one product after the other: every pair is looked at.
__device__ __forceinline__ void score_end(uint8_t* lists, Strands& strands, int group, int stage, int key, int thread) {
#pragma unroll 1
  for (int from = 0; from < kStageKeys; from += kKeys) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Always zero, and the compiler cannot know it: a product begun before the last one is dealt with takes too many
      // registers.
      const uint32_t zero = (strands.end[0] | strands.end[1] | strands.end[2] | strands.end[3]) >> 31;
      float products[kProducts];
      start_products(products, descriptor(shared_address(&shared.stages.keys[group][stage][from * kWidth])) + zero,
                     descriptor(shared_address(shared.query[half])));
      finish_products<0>(products);
      append<true>(products, lists, strands, half, &shared.stages.scales[group][stage][from], key + from, thread);
    }
  }
}

// Scores stages `from` to `to` of the pass and appends what passes the thresholds to the lists as the counts say they are.
// `counted` stages went before; how many they are now comes back.
template <bool kIsEnd>
__device__ __forceinline__ uint32_t score(uint8_t* lists, int from, int to, uint32_t counted, int k) {
  const int group = uniform(threadIdx.x / kGroupThreads), thread = threadIdx.x % kGroupThreads;
  from = uniform(from);
  to = uniform(to);
  Strands strands;
  strands.set_counts(group, thread);
  if (thread == 0) {
#pragma unroll
    for (int ahead = 0; ahead < kStages - 1; ++ahead)
      if (from + ahead * kGroups + group < to) load_stage(group, counted + ahead, from + ahead * kGroups + group);
  }
  for (int start = from; start < to; start += kRound * kGroups) {
    const int end = min(to, start + kRound * kGroups);
    for (int mine = start + group; mine < end; mine += kGroups) {
      // All threads have left the stage before this one: its buffer is free for the next copy.
      group_barrier(group);
      const int next = mine + (kStages - 1) * kGroups, stage = counted % kStages;
      if (thread == 0 && next < to) load_stage(group, counted + kStages - 1, next);
      wait_for(shared_address(&shared.arrived[group][stage]), counted / kStages & 1);
      ++counted;
      const int key = shared.pass.number_from + mine * kStageKeys;
      if (kIsEnd) {
        score_end(lists, strands, group, stage, key, thread);
      } else {
        score_stage(lists, strands, group, stage, key, thread);
      }
    }
    if (__syncthreads_or(strands.is_one_full(group, thread))) {
      strands.publish_counts(group, thread);
      prune_full_lists(lists, k);
      strands.set_counts(group, thread);
    }
  }
  strands.publish_counts(group, thread);
  __syncthreads();
  return counted;
}

// Closes the rows whose lists are complete and opens those whose threshold was too high; true where there are any.
__device__ __noinline__ bool must_score_again(int k) {
  if (threadIdx.x == 0) shared.needs_again = 0;
  __syncthreads();
  for (int query = threadIdx.x / 32; query < kTile; query += kThreads / 32) {
    if (!shared.is_long[query]) continue;
    const bool is_short_of = view_list(nullptr, shared.count[query]).total < k;
    __syncwarp();
    for (int strand = threadIdx.x & 31; is_short_of && strand < kStrands; strand += 32) shared.count[query][strand] = 0;
    if ((threadIdx.x & 31) == 0) {
      shared.threshold[query] = is_short_of ? -__int_as_float(0x7f800000) : __int_as_float(0x7fffffff);
      if (is_short_of) shared.needs_again = 1;
    }
  }
  __syncthreads();
  return shared.needs_again;
}

// Bounds over the rows that select.
__device__ __noinline__ void set_bounds(int num_keys) {
  shared.begin = num_keys;
  shared.end = shared.all_from = 0;
  shared.all_to = num_keys;
  for (int query = 0; query < kTile; ++query) {
    if (!shared.is_long[query]) continue;
    shared.begin = min(shared.begin, shared.first[query]);
    shared.end = max(shared.end, shared.last[query] + 1);
    shared.all_from = max(shared.all_from, shared.first[query]);
    shared.all_to = min(shared.all_to, shared.last[query]);
  }
}

// The sampled key of every stride keys: as good as random, and the same on every run.
__device__ __forceinline__ int sampled_key(int number, int stride) {
  uint32_t mixed = (uint32_t)number * 2654435761u;
  mixed ^= mixed >> 15;
  mixed *= 2246822519u;
  return number * stride + (int)((mixed >> 13) % (uint32_t)stride);
}

// Puts the 16-byte chunks of all keys, and of the sampled ones, where the swizzle of shared memory wants them.
__global__ void arrange_kernel(const uint8_t* keys, const float* scales, int num_keys, int stride, uint8_t* arranged,
                               float* arranged_scales, uint8_t* sample, float* sample_scales) {
  const int64_t piece = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  const int row = (int)(piece >> 2), chunk = (int)piece & 3, num_sampled = num_keys / stride;
  if (row >= num_keys + num_sampled) return;
  const bool is_sample = row >= num_keys;
  const int to = is_sample ? row - num_keys : row, from = is_sample ? sampled_key(to, stride) : row;
  uint8_t* out = (is_sample ? sample : arranged) + (int64_t)to * kWidth + ((chunk ^ ((to >> 1) & 3)) << 4);
  *reinterpret_cast<int4*>(out) = *reinterpret_cast<const int4*>(keys + (int64_t)from * kWidth + chunk * 16);
  if (chunk == 0) (is_sample ? sample_scales : arranged_scales)[to] = scales[from];
}

// Makes the lists of the tiles: of all their keys, or of the sample.
__global__ void __launch_bounds__(kThreads, 1) score_kernel(const __grid_constant__ Arguments a) {
  uint32_t counted = 0;
  for (int i = threadIdx.x; i < kGroups * kBins; i += kThreads) shared.group[i / kBins].bins[i % kBins] = 0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kGroups * kStages; ++i)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&shared.arrived[0][0] + i)) : "memory");
    publish_to_wgmma();
  }
  // The last tiles see the most keys and begin first.
  for (int number = blockIdx.x; number < a.num_tiles; number += gridDim.x) {
    const int tile = a.num_tiles - 1 - number;
    uint8_t* lists = a.lists + tile * kTile * kListBytes;
    load_queries(a, a.first_tile + tile);
    if (threadIdx.x == 0) set_bounds(a.num_keys);
    if (threadIdx.x < kTile) {
      // A row that takes no part is closed by a threshold that no score compares with.
      const float threshold = a.is_sample ? -__int_as_float(0x7f800000) : a.thresholds[tile * kTile + threadIdx.x];
      shared.threshold[threadIdx.x] = shared.is_long[threadIdx.x] ? threshold : __int_as_float(0x7fffffff);
    }
    for (int i = threadIdx.x; i < kTile * kStrands; i += kThreads) shared.count[i / kStrands][i % kStrands] = 0;
    __syncthreads();
    const int begin = shared.begin & ~7, num_stages = max(0, (shared.end - begin + kStageKeys - 1) / kStageKeys);
    // Keys that not every row sees stand at both ends; of the sample only what every row sees is taken, in whole stages.
    int from = min(num_stages, (shared.all_from - begin + kStageKeys - 1) / kStageKeys);
    int to = max(from, (shared.all_to + 1 - begin) / kStageKeys);
    Pass pass{a.keys, a.scales, begin, begin};
    if (a.is_sample) {
      const int first = (shared.all_from + a.stride - 1) / a.stride + 7 & ~7;
      pass = Pass{a.sample, a.sample_scales, first, 0};
      from = 0;
      to = max(0, (shared.all_to + 1) / a.stride - first) / kStageKeys;
      if (to * kStageKeys <= a.sample_rank) to = 0;
    }
    begin_pass(pass);
    // The first keys, those that every row sees, the last keys: one loop, since wgmma allows no calls.
    for (int part = a.is_sample ? 1 : 0; num_stages > 0; ++part) {
      if (part & 1) {
        counted = score<false>(lists, from, to, counted, a.k);
        if (a.is_sample) break;
      } else {
        counted = score<true>(lists, part ? to : 0, part ? num_stages : from, counted, a.k);
      }
      if (part < 2) continue;
      if (!must_score_again(a.k)) break;
      part = -1;
    }
    for (int i = threadIdx.x; i < kTile * kStrands; i += kThreads)
      a.counts[tile * kTile * kStrands + i] = shared.count[i / kStrands][i % kStrands];
    __syncthreads();
  }
}

__device__ __forceinline__ List view_row(const Arguments& a, int row) {
  return view_list(a.lists + row * kListBytes, a.counts + row * kStrands);
}

// A threshold that some k + margin keys of a row are expected to pass, from its scores of the sample; a block a row.
__global__ void __launch_bounds__(kGroupThreads) threshold_kernel(const __grid_constant__ Arguments a) {
  const int row = blockIdx.x, thread = threadIdx.x;
  GroupScratch& scratch = selector.scratch;
  const List list = view_row(a, row);
  float threshold = -__int_as_float(0x7f800000);
  if (list.total > a.sample_rank) {
    for (int i = thread; i < kBins; i += kGroupThreads) scratch.bins[i] = 0;
    int wanted = a.sample_rank;
    const Entries<kSampleSlots> entries(list, thread);
    threshold = from_ordered(cut_list<kNear>(entries, scratch, 0, thread, wanted).scores.low);
  }
  if (thread == 0) a.thresholds[row] = threshold;
}

// Apart, so that the usual rows' registers are not those of the longest ones.
__device__ __noinline__ void write_long_row(const List& list, int begin, int end, int k, int* out) {
  write_row(Entries<kSlots>(list, threadIdx.x), selector, threadIdx.x, begin, end, k, out);
}

// The selection of a row from its list; rows that see at most k keys take them all. A block a row.
__global__ void __launch_bounds__(kGroupThreads, 3) write_kernel(const __grid_constant__ Arguments a) {
  const int row = blockIdx.x, token = a.first_tile * kTile + row, thread = threadIdx.x;
  if (token >= a.num_queries) return;
  const int last = min(load_bound(a.last, a.are_wide, token), a.num_keys - 1);
  const int first = a.first ? load_bound(a.first, a.are_wide, token) : 0, num = last - first + 1;
  int* out = a.out + (int64_t)token * a.k;
  if (num <= a.k) {
    for (int i = thread; i < a.k; i += kGroupThreads) out[i] = i < num ? first + i : -1;
    return;
  }
  const List list = view_row(a, row);
  for (int i = thread; i < kBins; i += kGroupThreads) selector.scratch.bins[i] = 0;
  for (int i = thread; i < kWindow / 32; i += kGroupThreads) selector.bitmap[i] = 0;
  if (list.longest <= kUsualSlots) {
    write_row(Entries<kUsualSlots>(list, thread), selector, thread, first, last + 1, a.k, out);
  } else {
    write_long_row(list, first, last + 1, a.k, out);
  }
}

}  // namespace

extern "C" {

// Bytes of scratch for a tile of 16 queries.
int64_t indexer_select_tile_bytes() { return kTile * (kListBytes + kStrands + (int64_t)sizeof(float)); }

int indexer_select_max_k() { return kMaxK; }

// Keys of the sample, and one of how many it is.
static int sample_stride(int num_keys) {
  const int stride = (num_keys + kSampled - 1) / kSampled;
  return stride < kMinStride ? kMinStride : stride;
}

// Bytes of scratch for the arranged keys and their sample.
int64_t indexer_select_arranged_bytes(int num_keys) {
  return ((int64_t)num_keys + num_keys / sample_stride(num_keys) + 2 * kPadding + 4) * (kWidth + 4);
}

// Selects the k best keys of every query. All pointers are on the device and aligned to 16 bytes; `tiles` holds tiles_at_once
// times the scratch bytes of a tile.
int indexer_select(const void* query, const float* gates, const void* keys, const float* scales, const void* first,
                   const void* last, int are_wide, int num_queries, int num_keys, int k, int* out, void* arranged, void* tiles,
                   int tiles_at_once, int num_multiprocessors, cudaStream_t stream) {
  const int stride = sample_stride(num_keys), num_sampled = num_keys / stride, bytes = sizeof(Shared);
  const cudaError_t error = cudaFuncSetAttribute(score_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return (int)error;
  uint8_t* arranged_keys = (uint8_t*)arranged;
  uint8_t* sample = arranged_keys + ((int64_t)num_keys + kPadding) * kWidth;
  float* sample_scales = (float*)(sample + ((int64_t)num_sampled + kPadding) * kWidth);
  float* arranged_scales = sample_scales + (num_sampled + kPadding + 3) / 4 * 4;
  const int64_t num_pieces = ((int64_t)num_keys + num_sampled) * 4;
  arrange_kernel<<<(unsigned)((num_pieces + 255) / 256), 256, 0, stream>>>(
      (const uint8_t*)keys, scales, num_keys, stride, arranged_keys, arranged_scales, sample, sample_scales);
  // The threshold lies six standard deviations of the sample below the score that k keys are expected to reach.
  const float expected = (float)k / stride;
  const int sample_rank = (int)(expected + 6.0f * sqrtf(expected) + 4.0f);
  uint8_t* counts = (uint8_t*)tiles + tiles_at_once * kTile * kListBytes;
  Arguments arguments{(const uint8_t*)query, gates, arranged_keys, arranged_scales, sample, sample_scales, stride, sample_rank, 0,
                      first, last, are_wide, num_queries, num_keys, k, out, 0, 0, (uint8_t*)tiles, counts,
                      (float*)(counts + tiles_at_once * kTile * kStrands)};
  const int num_tiles = (num_queries + kTile - 1) / kTile;
  for (int start = 0; start < num_tiles; start += tiles_at_once) {
    arguments.first_tile = start;
    arguments.num_tiles = num_tiles - start < tiles_at_once ? num_tiles - start : tiles_at_once;
    const int num_blocks = arguments.num_tiles < num_multiprocessors ? arguments.num_tiles : num_multiprocessors;
    const int num_rows = arguments.num_tiles * kTile;
    arguments.is_sample = 1;
    score_kernel<<<num_blocks, kThreads, bytes, stream>>>(arguments);
    threshold_kernel<<<num_rows, kGroupThreads, sizeof(GroupScratch), stream>>>(arguments);
    arguments.is_sample = 0;
    score_kernel<<<num_blocks, kThreads, bytes, stream>>>(arguments);
    write_kernel<<<num_rows, kGroupThreads, sizeof(SelectorMemory), stream>>>(arguments);
  }
  return (int)cudaGetLastError();
}

}
