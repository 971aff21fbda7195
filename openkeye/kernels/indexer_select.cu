// The lightning indexer's selection for sm_90a: scores in fp8 and exact top-k, no matrix of scores anywhere. Five kernels:
// the keys are arranged, a sample of them is scored, thresholds come of it, all keys are scored, the best are written.
//
// A block owns 16 neighbouring queries. Their 16 x 16 heads are the columns of two wgmma tiles and stay in shared memory.
// Two warpgroups, a half of the queries each, walk the same stages of 512 keys; two such pairs take turns at stages. While
// some warpgroups' products are under way, others weigh, sum and compare theirs. The rows of the column operand are ordered so
// that all heads of a query fall to one thread: that needs no exchange between threads, and a thread meets two queries only,
// whose gates stay in its registers (read from shared memory for each tile they took more of its bandwidth than the products).
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
// A row's list has a strand for each of the 64 threads that meet its scores, so that appending needs no atomic and no branch:
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
constexpr int kStageKeys = 512;
constexpr int kStageTiles = kStageKeys / kKeys;
constexpr int kStageBytes = kStageKeys * (kWidth + 4);
constexpr int kGroups = 2 * kParts;         // warpgroups
constexpr int kThreads = kGroups * kGroupThreads;
constexpr int kStages = 2;
constexpr int kFullAt = kSlots - kStageKeys / kOwners;
constexpr int kNear = 8;                   // entries around the wanted one that a sample's threshold may be off
constexpr int kUsualSlots = 84;            // of the longest strand of most rows
constexpr int kSampled = 4096;             // keys of a sample at most: as many as a list holds without a threshold
constexpr int kSampleSlots = (kSampled / kStageKeys + kParts - 1) / kParts * (kStageKeys / kOwners);
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
  alignas(1024) uint8_t keys[kParts][kStages][kStageKeys * kWidth];
  alignas(16) float scales[kParts][kStages][kStageKeys];
};

struct Shared {
  alignas(1024) uint8_t query[2][kColumns * kWidth];
  Stages stages;
  alignas(8) uint64_t arrived[kParts][kStages];
  int num_left[kParts][kStages];           // warpgroups that are done with a stage, counted through all of them
  alignas(16) float weights[2][kHalf * kHeads];
  alignas(16) float threshold[kTile];
  alignas(16) int first[kTile];
  alignas(16) int last[kTile];
  uint8_t count[kTile][kStrands];          // entries of every strand, once a pass has ended or a list is full
  int is_long[kTile];
  int needs_again;
  int is_one_full;                         // a strand, so that all warpgroups come to look after the lists
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

// A barrier of the warpgroup: whether any of its threads says so.
__device__ __forceinline__ bool group_any(int group, int mine) {
  int any;
  asm volatile(
      "{\n"
      ".reg .pred mine, any;\n"
      "setp.ne.s32 mine, %3, 0;\n"
      "bar.red.or.pred any, %1, %2, mine;\n"
      "selp.s32 %0, 1, 0, any;\n"
      "}\n"
      : "=r"(any)
      : "r"(group + 1), "n"(kGroupThreads), "r"(mine)
      : "memory");
  return any != 0;
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

// Stages of a pair of warpgroups, counted through all passes: which buffer, and which turn of its barrier.
__device__ __forceinline__ void load_stage(int part, uint32_t counted, int number) {
  const Pass& pass = shared.pass;
  const int stage = counted % kStages, start = pass.begin + number * kStageKeys;
  const uint32_t barrier = shared_address(&shared.arrived[part][stage]);
  expect_bytes(barrier, kStageBytes);
  copy_in_bulk(shared_address(shared.stages.keys[part][stage]), pass.keys + (int64_t)start * kWidth, kStageKeys * kWidth, barrier);
  copy_in_bulk(shared_address(shared.stages.scales[part][stage]), pass.scales + start, kStageKeys * 4, barrier);
}

// Which of the block's work is this thread's.
struct Place {
  int group, part, half, thread;           // thread of the warpgroup
  __device__ __forceinline__ Place()
      : group(uniform(threadIdx.x / kGroupThreads)), part(group >> 1), half(group & 1), thread(threadIdx.x % kGroupThreads) {}
  __device__ __forceinline__ int owner() const { return (thread >> 5) * 8 + ((thread & 31) >> 2); }
  __device__ __forceinline__ int strand() const { return part * kOwners + owner(); }
  __device__ __forceinline__ int query(int a) const { return half * kHalf + 2 * (thread & 3) + a; }
};

// Where this thread appends: the byte offsets of its strands' ends, for its two queries.
struct Strands {
  uint32_t end[2];
  __device__ __forceinline__ static uint32_t begin(const Place& place, int a) {
    return ((place.query(a) * kParts + place.part) * kSlots) * kSlotBytes + place.owner() * 8;
  }
  __device__ __forceinline__ int count(const Place& place, int a) const {
    return (int)(end[a] - begin(place, a)) / kSlotBytes;
  }
  __device__ __forceinline__ void set_counts(const Place& place) {
#pragma unroll
    for (int a = 0; a < 2; ++a) end[a] = begin(place, a) + shared.count[place.query(a)][place.strand()] * kSlotBytes;
  }
  __device__ __forceinline__ void publish_counts(const Place& place) const {
#pragma unroll
    for (int a = 0; a < 2; ++a) shared.count[place.query(a)][place.strand()] = (uint8_t)count(place, a);
  }
  __device__ __forceinline__ bool is_one_full(const Place& place) const {
    return max(count(place, 0), count(place, 1)) > kFullAt;
  }
};

// The gates of the two queries whose products a thread meets, halved.
struct Weights {
  float of[2 * kHeads];
  __device__ __forceinline__ explicit Weights(const Place& place) {
    const float4* weights = reinterpret_cast<const float4*>(shared.weights[place.half]);
#pragma unroll
    for (int part = 0; part < 2 * kHeads / 4; ++part) {
      const float4 w = weights[part * 4 + (place.thread & 3)];
      of[part * 4] = w.x;
      of[part * 4 + 1] = w.y;
      of[part * 4 + 2] = w.z;
      of[part * 4 + 3] = w.w;
    }
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
__device__ __forceinline__ void append(const float (&d)[kProducts], const Weights& weights, uint8_t* lists, Strands& strands,
                                       const Place& place, const float* scales, int key) {
  const int row = (place.thread >> 5) * 16 + ((place.thread & 31) >> 2);
  const float scale0 = scales[row], scale1 = scales[row + 8];
  const float2 limits = *reinterpret_cast<const float2*>(&shared.threshold[place.query(0)]);
#pragma unroll
  for (int a = 0; a < 2; ++a) {
    float sum0 = 0.0f, sum1 = 0.0f;
#pragma unroll
    for (int part = 0; part < 4; ++part) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int head = part * 4 + e;
        const float x = d[(8 * a + head / 2) * 4 + (head & 1)], y = d[(8 * a + head / 2) * 4 + 2 + (head & 1)];
        // Twice the ReLU in one full-rate instruction; the weights are halved.
        const float weight = weights.of[a * kHeads + head];
        sum0 = fmaf(x + fabsf(x), weight, sum0);
        sum1 = fmaf(y + fabsf(y), weight, sum1);
      }
    }
    const float limit = a ? limits.y : limits.x;
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      // A score that is no number ranks last: every row must end with k entries.
      const float score = fmaxf((below ? sum1 : sum0) * (below ? scale1 : scale0), -kLargest);
      const int mine = key + row + 8 * below;
      int is_seen = 1;
      if (kIsEnd) is_seen = mine >= shared.first[place.query(a)] && mine <= shared.last[place.query(a)];
      append_if_passed(score, limit, is_seen, mine, lists, strands.end[a]);
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
  if (threadIdx.x == 0) shared.is_one_full = 0;
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

// The products of a stage: every tile of 64 keys with this warpgroup's half of the queries, one product after the other. Where
// not every row sees the whole stage, every pair is looked at.
template <bool kIsEnd>
__device__ __forceinline__ void score_stage(const Weights& weights, uint8_t* lists, Strands& strands, const Place& place, int stage,
                                            int key) {
  const int part = place.part;
  const uint64_t keys = descriptor(shared_address(shared.stages.keys[part][stage]));
  const uint64_t queries = descriptor(shared_address(shared.query[place.half]));
  const float* scales = shared.stages.scales[part][stage];
  constexpr int kUnrolled = kIsEnd ? 1 : 4;
#pragma unroll kUnrolled
  for (int tile = 0; tile < kStageTiles; ++tile) {
    float products[kProducts];
    start_products(products, keys + tile * (kKeys * kWidth / 16), queries);
    finish_products<0>(products);
    append<kIsEnd>(products, weights, lists, strands, place, scales + tile * kKeys, key + tile * kKeys);
  }
}

// Scores stages `from` to `to` of the pass and appends what passes the thresholds to the lists as the counts say they are.
// `counted` stages of this pair went before; how many they are now comes back.
template <bool kIsEnd>
__device__ __forceinline__ uint32_t score(uint8_t* lists, int from, int to, uint32_t counted, int k) {
  const Place place;
  from = uniform(from);
  to = uniform(to);
  const Weights weights(place);
  Strands strands;
  strands.set_counts(place);
  if (place.thread == 0 && place.half == 0) {
#pragma unroll
    for (int ahead = 0; ahead < kStages; ++ahead)
      if (from + ahead * kParts + place.part < to) load_stage(place.part, counted + ahead, from + ahead * kParts + place.part);
  }
  const int part = place.part;
  bool has_left = true;                    // the stage before, which then may be overwritten
  // The warpgroups meet only where a strand is full, and at the end.
  for (int mine = from + part;;) {
    while (mine < to) {
      // Also makes sure that all threads have left the stage before this one.
      const bool must_stop = group_any(place.group, *(volatile int*)&shared.is_one_full);
      if (place.thread == 0 && !has_left) {
        // The second of the pair to leave a stage has it filled again.
        __threadfence_block();
        const int last = mine - kParts, next = last + kStages * kParts;
        const bool is_second = atomicAdd(&shared.num_left[part][(counted - 1) % kStages], 1) & 1;
        if (is_second && next < to) load_stage(part, counted - 1 + kStages, next);
      }
      has_left = true;
      if (must_stop) break;
      const int stage = counted % kStages;
      wait_for(shared_address(&shared.arrived[part][stage]), counted / kStages & 1);
      score_stage<kIsEnd>(weights, lists, strands, place, stage, shared.pass.number_from + mine * kStageKeys);
      ++counted;
      mine += kParts;
      has_left = false;
      if (strands.is_one_full(place)) *(volatile int*)&shared.is_one_full = 1;
    }
    const bool are_all_done = __syncthreads_and(mine >= to);
    if (shared.is_one_full) {
      strands.publish_counts(place);
      prune_full_lists(lists, k);
      strands.set_counts(place);
    }
    if (are_all_done) break;
  }
  strands.publish_counts(place);
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

// Bounds over the rows that select, by one warp.
__device__ __noinline__ void set_bounds(int num_keys) {
  const int query = threadIdx.x & 31;
  const bool selects = query < kTile && shared.is_long[query];
  const int first = selects ? shared.first[query] : num_keys, last = selects ? shared.last[query] : -1;
  const int begin = __reduce_min_sync(~0u, first), end = __reduce_max_sync(~0u, last + 1);
  const int all_from = __reduce_max_sync(~0u, selects ? first : 0), all_to = __reduce_min_sync(~0u, selects ? last : num_keys);
  if (query == 0) {
    shared.begin = begin;
    shared.end = end;
    shared.all_from = all_from;
    shared.all_to = all_to;
  }
}

// The sampled key of every stride keys: as good as random, and the same on every run.
__device__ __forceinline__ int sampled_key(int number, int stride) {
  uint32_t mixed = (uint32_t)number * 2654435761u;
  mixed ^= mixed >> 15;
  mixed *= 2246822519u;
  return number * stride + (int)((mixed >> 13) % (uint32_t)stride);
}

// Where keys lie: in order, or in the pages of a table.
struct Pages {
  const int* table;        // or null
  int size, step;          // slots of a page; between entries of the table
  __device__ __forceinline__ int64_t slot(int key) const {
    return table ? (int64_t)table[(int64_t)(key / size) * step] * size + key % size : key;
  }
};

// Puts the 16-byte chunks of all keys, and of the sampled ones, where the swizzle of shared memory wants them.
__global__ void arrange_kernel(const uint8_t* keys, const float* scales, const Pages pages, int num_keys, int stride,
                               uint8_t* arranged, float* arranged_scales, uint8_t* sample, float* sample_scales) {
  const int64_t piece = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  const int row = (int)(piece >> 2), chunk = (int)piece & 3, num_sampled = num_keys / stride;
  if (row >= num_keys + num_sampled) return;
  const bool is_sample = row >= num_keys;
  const int to = is_sample ? row - num_keys : row;
  const int64_t from = pages.slot(is_sample ? sampled_key(to, stride) : row);
  uint8_t* out = (is_sample ? sample : arranged) + (int64_t)to * kWidth + ((chunk ^ ((to >> 1) & 3)) << 4);
  *reinterpret_cast<int4*>(out) = *reinterpret_cast<const int4*>(keys + from * kWidth + chunk * 16);
  if (chunk == 0) (is_sample ? sample_scales : arranged_scales)[to] = scales[from];
}

// Makes the lists of the tiles: of all their keys, or of the sample.
__global__ void __launch_bounds__(kThreads, 1) score_kernel(const __grid_constant__ Arguments a) {
  uint32_t counted = 0;
  for (int i = threadIdx.x; i < kGroups * kBins; i += kThreads) shared.group[i / kBins].bins[i % kBins] = 0;
  if (threadIdx.x < kParts * kStages) (&shared.num_left[0][0])[threadIdx.x] = 0;
  if (threadIdx.x == 0) {
    shared.is_one_full = 0;
    for (int i = 0; i < kParts * kStages; ++i)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&shared.arrived[0][0] + i)) : "memory");
    publish_to_wgmma();
  }
  // The last tiles see the most keys and begin first.
  for (int number = blockIdx.x; number < a.num_tiles; number += gridDim.x) {
    const int tile = a.num_tiles - 1 - number;
    uint8_t* lists = a.lists + tile * kTile * kListBytes;
    load_queries(a, a.first_tile + tile);
    if (threadIdx.x < 32) set_bounds(a.num_keys);
    if (threadIdx.x < kTile) {
      // A row that takes no part is closed by a threshold that no score compares with.
      const float threshold = a.is_sample ? -__int_as_float(0x7f800000) : a.thresholds[tile * kTile + threadIdx.x];
      shared.threshold[threadIdx.x] = shared.is_long[threadIdx.x] ? threshold : __int_as_float(0x7fffffff);
    }
    for (int i = threadIdx.x; i < kTile * kStrands; i += kThreads) shared.count[i / kStrands][i % kStrands] = 0;
    __syncthreads();
    const int begin = shared.begin & ~7, num_stages = max(0, (shared.end - begin + kStageKeys - 1) / kStageKeys);
    // Keys that not every row sees stand at both ends; the sample is taken in whole stages.
    int from = min(num_stages, (shared.all_from - begin + kStageKeys - 1) / kStageKeys);
    int to = max(from, (shared.all_to + 1 - begin) / kStageKeys);
    Pass pass{a.keys, a.scales, begin, begin};
    if (a.is_sample) {
      const int first = (shared.all_from + a.stride - 1) / a.stride + 7 & ~7;
      pass = Pass{a.sample, a.sample_scales, first, 0};
      from = 0;
      // To the nearest stage, even where it ends behind what the rows see: only speed depends on the sample.
      const int num_seen = max(0, (shared.all_to + 1) / a.stride - first);
      to = min((num_seen + kStageKeys / 2) / kStageKeys, max(0, a.num_keys / a.stride - first) / kStageKeys);
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
__global__ void __launch_bounds__(kGroupThreads, 7) threshold_kernel(const __grid_constant__ Arguments a) {
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
__global__ void __launch_bounds__(kGroupThreads, 5) write_kernel(const __grid_constant__ Arguments a) {
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

// Selects the k best keys of every query. All pointers are on the device, queries, keys and scratch aligned to 16 bytes; `tiles`
// holds tiles_at_once times the scratch bytes of a tile. Keys are in order, or where page_table is not null in its pages.
int indexer_select(const void* query, const float* gates, const void* keys, const float* scales, const void* first,
                   const void* last, const int* page_table, int are_wide, int page_size, int table_step, int num_queries,
                   int num_keys, int k, int* out, void* arranged, void* tiles, int tiles_at_once, int num_multiprocessors, cudaStream_t stream) {
  const int stride = sample_stride(num_keys), num_sampled = num_keys / stride, bytes = sizeof(Shared);
  const cudaError_t error = cudaFuncSetAttribute(score_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return (int)error;
  uint8_t* arranged_keys = (uint8_t*)arranged;
  uint8_t* sample = arranged_keys + ((int64_t)num_keys + kPadding) * kWidth;
  float* sample_scales = (float*)(sample + ((int64_t)num_sampled + kPadding) * kWidth);
  float* arranged_scales = sample_scales + (num_sampled + kPadding + 3) / 4 * 4;
  const int64_t num_pieces = ((int64_t)num_keys + num_sampled) * 4;
  arrange_kernel<<<(unsigned)((num_pieces + 255) / 256), 256, 0, stream>>>(
      (const uint8_t*)keys, scales, Pages{page_table, page_size, table_step}, num_keys, stride, arranged_keys, arranged_scales,
      sample, sample_scales);
  // The threshold lies five standard deviations of the sample below the score that k keys are expected to reach.
  const float expected = (float)k / stride;
  const int sample_rank = (int)(expected + 5.0f * sqrtf(expected) + 4.0f);
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
