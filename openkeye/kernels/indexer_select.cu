// The lightning indexer's selection for sm_90a: scores in fp8 and exact top-k in one kernel, no matrix of scores anywhere.
//
// A block owns 16 neighbouring queries. Their 16 x 16 heads are the 256 columns of one wgmma tile and stay in shared memory;
// three warpgroups take turns at stages of 128 keys. The rows of the column operand are ordered so that all heads of a query
// fall to one thread: weighing and summing them needs no exchange between threads.
//
// The keys are arranged first: in the order in which wgmma reads shared memory, so that a stage is one bulk copy, and a sample
// of them is drawn, one of every `stride`.
//
// Instead of writing scores, a row keeps what may still be among its k best. The sample, scored first, gives each
// row a threshold that some k + margin keys are expected to pass; keys that pass are appended to the row's list. A list that
// fills up is pruned to its k best and the threshold rises to the k-th of them; a list that ends with fewer than k keys (an
// unlucky sample) is made again without a threshold. So the result is exact whatever the scores are, and only its speed
// depends on the sample.
//
// A row's list has a strand for each of the 96 threads that meet its scores, so that appending needs no atomic and no branch:
// a store and an addition under a predicate. When a list is read, each entry becomes one 64-bit number that is ordered as the
// selection is: the score's bits, ordered as floats are, above the complement of the key's position. The k largest numbers
// are the k best scores with ties to the smaller position.

#include <cuda_runtime.h>
#include <stdint.h>

namespace {

constexpr int kTile = 16;                  // queries of a block
constexpr int kHeads = 16;
constexpr int kWidth = 64;                 // bytes of a vector in e4m3
constexpr int kColumns = kTile * kHeads;   // of the wgmma tile
constexpr int kKeys = 64;                  // rows of the wgmma tile
constexpr int kStageKeys = 128;
constexpr int kStageBytes = kStageKeys * (kWidth + 4);
constexpr int kGroups = 3;                 // warpgroups
constexpr int kGroupThreads = 128;
constexpr int kThreads = kGroups * kGroupThreads;
constexpr int kStages = 4;
constexpr int kRound = 4;                  // stages of a warpgroup between two looks at the lists
constexpr int kOwners = 32;                // strands of a row's list in each warpgroup
constexpr int kStrands = kGroups * kOwners;
constexpr int kSlots = 128;                // entries of a strand
constexpr int kSlotBytes = kOwners * 8;    // between the entries of a strand: a warp reads 32 strands at once
constexpr int kFullAt = kSlots - kRound * (kStageKeys / kOwners);
constexpr int kInRegisters = 20;           // slots of each warpgroup's strands that a thread holds during the selection
constexpr int kBins = 2048;
constexpr int kNear = 8;                   // entries around the wanted one that a sample's threshold may be off
constexpr int kTies = 128;                 // entries of a bin that are ranked by comparing all pairs
constexpr int kWindow = 131072;            // positions of the bitmap that sorts a selection
constexpr int kSampleAbove = 16384;        // visible keys from which a sample pays
constexpr int kSampled = 4096;             // keys of a sample at most
constexpr int kPadding = 2 * kStageKeys;   // keys past the end that a stage may copy; none is ever chosen

constexpr float kLargest = 3.402823466e38f;

struct GroupScratch {
  uint32_t bitmap[kWindow / 32];
  uint32_t bins[kBins];
  unsigned long long ties[kTies];
  unsigned long long kth, high, low;
  int warp_sums[4];
  int bin, above, in_bin, num_ties, num_kept;
};

struct Shared {
  alignas(1024) uint8_t query[kColumns * kWidth];
  alignas(1024) uint8_t keys[kGroups][kStages][kStageKeys * kWidth];
  alignas(16) float scales[kGroups][kStages][kStageKeys];
  alignas(8) uint64_t arrived[kGroups][kStages];
  alignas(16) float weights[kTile * kHeads];
  alignas(16) float threshold[kTile];
  alignas(16) int first[kTile];
  alignas(16) int last[kTile];
  uint8_t count[kTile][kStrands];          // entries of every strand, once a pass has ended or a list is full
  int total[kTile];                        // and of the row
  int longest[kTile];                      // strand of the row
  int is_long[kTile];
  int needs_again;
  GroupScratch group[kGroups];
};

static_assert(sizeof(Shared) <= 232448, "a block of sm_90 has 227 KiB of shared memory");

extern __shared__ __align__(1024) uint8_t block_memory[];

// By these names everywhere, so that the compiler knows the address space.
#define scratch (shared.group[group])
#define shared (*reinterpret_cast<Shared*>(block_memory))

struct Arguments {
  const uint8_t* query;    // [T, 16, 64] e4m3
  const float* gates;      // [T, 16], times the query's scale
  const uint8_t* keys;     // [S + padding, 64] e4m3, arranged
  const float* scales;     // [S + padding]
  const uint8_t* sample;   // [S / stride + padding, 64], arranged
  const float* sample_scales;
  int stride;
  const void* first;       // [T] first visible key, or null for 0
  const void* last;        // [T] last visible key
  int are_wide;            // first and last are int64
  int num_queries, num_keys, k;
  int* out;                // [T, k]
  uint8_t* lists;
};

constexpr int64_t kListBytes = (int64_t)kGroups * kSlots * kSlotBytes;

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

__device__ __forceinline__ uint32_t ordered(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);
  return (bits >> 31) ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float from_ordered(uint32_t bits) {
  return __uint_as_float((bits >> 31) ? bits & 0x7fffffffu : ~bits);
}

__device__ __forceinline__ int position_of(unsigned long long value) { return (int)~(uint32_t)value; }

__device__ __forceinline__ int load_bound(const void* bounds, int are_wide, int row) {
  return are_wide ? (int)((const long long*)bounds)[row] : ((const int*)bounds)[row];
}

#define A8(b) "%" #b "0, %" #b "1, %" #b "2, %" #b "3, %" #b "4, %" #b "5, %" #b "6, %" #b "7, %" #b "8, %" #b "9, "
#define ACCUMULATORS                                                                                                    \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " A8(1) A8(2) A8(3) A8(4) A8(5) A8(6) A8(7) A8(8) A8(9) A8(10) A8(11)        \
      "%120, %121, %122, %123, %124, %125, %126, %127"
#define D4(m, i) m(d[i]), m(d[i + 1]), m(d[i + 2]), m(d[i + 3])
#define D16(m, i) D4(m, i), D4(m, i + 4), D4(m, i + 8), D4(m, i + 12)
#define D128(m) D16(m, 0), D16(m, 16), D16(m, 32), D16(m, 48), D16(m, 64), D16(m, 80), D16(m, 96), D16(m, 112)
#define OUT(x) "=f"(x)
#define INOUT(x) "+f"(x)

// Starts d = keys . queries: [64, 256], width 64 in two steps of 32.
__device__ __forceinline__ void start_products(float (&d)[128], uint64_t keys, uint64_t queries) {
  asm volatile(
      "{\n"
      "wgmma.fence.sync.aligned;\n"
      "wgmma.mma_async.sync.aligned.m64n256k32.f32.e4m3.e4m3 {" ACCUMULATORS "}, %128, %129, 0, 1, 1;\n"
      "wgmma.mma_async.sync.aligned.m64n256k32.f32.e4m3.e4m3 {" ACCUMULATORS "}, %130, %131, 1, 1, 1;\n"
      "wgmma.commit_group.sync.aligned;\n"
      "}\n"
      : D128(OUT)
      : "l"(keys), "l"(queries), "l"(keys + 2), "l"(queries + 2)
      : "memory");
}

__device__ __forceinline__ void finish_products(float (&d)[128]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;\n" : D128(INOUT)::"memory");
}

// The keys a pass scores: `num` from `begin` on, a multiple of 8.
struct Pass {
  const uint8_t* keys;
  const float* scales;
  int begin, num;
};

// Stages of a warpgroup, counted through all passes: which buffer, and which turn of its barrier.
__device__ __forceinline__ void load_stage(const Pass& pass, int group, uint32_t counted, int number) {
  const int stage = counted % kStages, start = pass.begin + number * kStageKeys;
  const uint32_t barrier = shared_address(&shared.arrived[group][stage]);
  expect_bytes(barrier, kStageBytes);
  copy_in_bulk(shared_address(shared.keys[group][stage]), pass.keys + (int64_t)start * kWidth, kStageKeys * kWidth, barrier);
  copy_in_bulk(shared_address(shared.scales[group][stage]), pass.scales + start, kStageKeys * 4, barrier);
}

// Where this thread appends: the byte offsets of its strands' ends, for queries 4 (lane % 4) + a.
struct Strands {
  uint32_t end[4];
  __device__ __forceinline__ static uint32_t begin(int query, int group, int owner) {
    return ((query * kGroups + group) * kSlots) * kSlotBytes + owner * 8;
  }
  __device__ __forceinline__ static int owner(int thread) { return (thread >> 5) * 8 + ((thread & 31) >> 2); }
  __device__ __forceinline__ int count(int a, int group, int thread) const {
    return (int)(end[a] - begin(4 * (thread & 3) + a, group, owner(thread))) / kSlotBytes;
  }
  __device__ __forceinline__ void set_counts(int group, int thread, bool is_empty) {
#pragma unroll
    for (int a = 0; a < 4; ++a) {
      const int query = 4 * (thread & 3) + a, strand = group * kOwners + owner(thread);
      end[a] = begin(query, group, owner(thread)) + (is_empty ? 0 : shared.count[query][strand]) * kSlotBytes;
    }
  }
  __device__ __forceinline__ void publish_counts(int group, int thread) const {
#pragma unroll
    for (int a = 0; a < 4; ++a)
      shared.count[4 * (thread & 3) + a][group * kOwners + owner(thread)] = (uint8_t)count(a, group, thread);
  }
  __device__ __forceinline__ bool is_one_full(int group, int thread) const {
    int most = 0;
#pragma unroll
    for (int a = 0; a < 4; ++a) most = max(most, count(a, group, thread));
    return most > kFullAt;
  }
};

// Sums over the heads and appends what passes. Thread layout of the products: rows (keys) lane / 4 and + 8 of the warp's 16,
// columns 8 i + 2 (lane % 4) + b, which hold query 4 (lane % 4) + i / 8 and head 2 (i % 8) + b.
template <bool kNearAnEnd>
__device__ __forceinline__ void append(const float (&d)[128], uint8_t* lists, Strands& strands, const float* scales, int key,
                                       int thread) {
  const int quad = thread & 3, row = (thread >> 5) * 16 + ((thread & 31) >> 2);
  const float scale0 = scales[row], scale1 = scales[row + 8];
  const float4* weights = reinterpret_cast<const float4*>(shared.weights);
  const float4 limits = reinterpret_cast<const float4*>(shared.threshold)[quad];
  const float limit[4] = {limits.x, limits.y, limits.z, limits.w};
#pragma unroll
  for (int a = 0; a < 4; ++a) {
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
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      // A score that is no number ranks last: every row must end with k entries.
      const float score = fmaxf((below ? sum1 : sum0) * (below ? scale1 : scale0), -kLargest);
      const int mine = key + row + 8 * below;
      bool is_passed = score >= limit[a];
      if (kNearAnEnd) is_passed &= mine >= shared.first[4 * quad + a] && mine <= shared.last[4 * quad + a];
      if (is_passed) {
        *reinterpret_cast<int2*>(lists + strands.end[a]) = make_int2(mine, __float_as_int(score));
        strands.end[a] += kSlotBytes;
      }
    }
  }
}

// Sum over the warpgroup of everything before this thread; `total` is the whole sum.
__device__ __forceinline__ int exclusive_sum(int group, int thread, int value, int& total) {
  int sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, sum, step);
    if ((thread & 31) >= step) sum += other;
  }
  if ((thread & 31) == 31) scratch.warp_sums[thread >> 5] = sum;
  group_barrier(group);
  int before = 0;
  total = 0;
#pragma unroll
  for (int warp = 0; warp < 4; ++warp) {
    before += warp < (thread >> 5) ? scratch.warp_sums[warp] : 0;
    total += scratch.warp_sums[warp];
  }
  group_barrier(group);
  return before + sum - value;
}

__device__ __forceinline__ unsigned long long read_entry(const uint8_t* place) {
  const int2 raw = __ldcg(reinterpret_cast<const int2*>(place));
  return ((unsigned long long)ordered(__int_as_float(raw.y)) << 32) | (uint32_t)~raw.x;
}

// The entries of a row's list, for a whole warpgroup: visit(entry) is called once for each. A warp reads a slot of 32 strands
// at a time. From registers, where the strands are short enough; else from memory every time.
struct FromRegisters {
  unsigned long long values[kGroups][kInRegisters];
  __device__ __forceinline__ FromRegisters(const uint8_t* list, int query, int thread) {
    const int lane = thread & 31, warp = thread >> 5;
#pragma unroll
    for (int from = 0; from < kGroups; ++from) {
      const int count = shared.count[query][from * kOwners + lane];
#pragma unroll
      for (int i = 0; i < kInRegisters; ++i) {
        const int slot = i * 4 + warp;
        values[from][i] = slot < count ? read_entry(list + (from * kSlots + slot) * kSlotBytes + lane * 8) : 0ull;
      }
    }
  }
  template <typename Visit>
  __device__ __forceinline__ void each(Visit visit) const {
#pragma unroll
    for (int from = 0; from < kGroups; ++from)
#pragma unroll
      for (int i = 0; i < kInRegisters; ++i)
        if (values[from][i]) visit(values[from][i]);
  }
};

struct FromMemory {
  const uint8_t* list;
  int query, thread;
  __device__ __forceinline__ FromMemory(const uint8_t* list, int query, int thread)
      : list(list), query(query), thread(thread) {}
  template <typename Visit>
  __device__ __forceinline__ void each(Visit visit) const {
    const int lane = thread & 31, longest = shared.longest[query];
    for (int from = 0; from < kGroups; ++from) {
      const int count = shared.count[query][from * kOwners + lane];
#pragma unroll 4
      for (int slot = thread >> 5; slot < longest; slot += 4)
        if (slot < count) visit(read_entry(list + (from * kSlots + slot) * kSlotBytes + lane * 8));
    }
  }
};

// Totals of the counts that a pass has published; one warp a row.
__device__ __forceinline__ void count_rows() {
  for (int query = threadIdx.x / 32; query < kTile; query += kThreads / 32) {
    int total = 0, longest = 0;
    for (int strand = threadIdx.x & 31; strand < kStrands; strand += 32) {
      total += shared.count[query][strand];
      longest = max(longest, (int)shared.count[query][strand]);
    }
    total = __reduce_add_sync(~0u, total);
    longest = __reduce_max_sync(~0u, longest);
    if ((threadIdx.x & 31) == 0) {
      shared.total[query] = total;
      shared.longest[query] = longest;
    }
  }
}

// The bin of 2,048 between the smallest and largest entry in which the wanted-th largest lies, refined until it holds at most
// kFew entries. Afterwards low and high of the scratch bound the bin, `wanted` is the rank inside it.
template <int kFew, typename Entries>
__device__ __forceinline__ void narrow(const Entries& entries, int group, int thread, int& wanted) {
  unsigned long long high = 0, low = ~0ull;
  entries.each([&](unsigned long long value) {
    high = value > high ? value : high;
    low = value < low ? value : low;
  });
#pragma unroll
  for (int step = 16; step; step /= 2) {
    const unsigned long long h = __shfl_xor_sync(~0u, high, step), l = __shfl_xor_sync(~0u, low, step);
    high = h > high ? h : high;
    low = l < low ? l : low;
  }
  if (thread == 0) {
    scratch.high = 0;
    scratch.low = ~0ull;
  }
  group_barrier(group);
  if ((thread & 31) == 0) {
    atomicMax(&scratch.high, high);
    atomicMin(&scratch.low, low);
  }
  group_barrier(group);
  high = scratch.high;
  low = scratch.low;
  for (;;) {
    const int bits = 64 - __clzll(high - low);
    const int shift = bits > 11 ? bits - 11 : 0;
    entries.each([&](unsigned long long value) {
      if (value >= low && value <= high) atomicAdd(&scratch.bins[(value - low) >> shift], 1u);
    });
    group_barrier(group);
    constexpr int kOwn = kBins / kGroupThreads;
    int own[kOwn], sum = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      uint32_t& bin = scratch.bins[kBins - 1 - (thread * kOwn + i)];
      own[i] = (int)bin;
      bin = 0;
      sum += own[i];
    }
    int total;
    int above = exclusive_sum(group, thread, sum, total);
    if (above < wanted && above + sum >= wanted) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if (above < wanted && above + own[i] >= wanted) {
          scratch.bin = kBins - 1 - (thread * kOwn + i);
          scratch.above = above;
          scratch.in_bin = own[i];
        }
        above += own[i];
      }
    }
    group_barrier(group);
    low += (unsigned long long)scratch.bin << shift;
    const unsigned long long end = low + ((1ull << shift) - 1);
    high = end < high ? end : high;
    wanted -= scratch.above;
    const bool is_done = scratch.in_bin <= kFew || shift == 0;
    group_barrier(group);
    if (is_done) break;
  }
  if (thread == 0) {
    scratch.low = low;
    scratch.high = high;
  }
  group_barrier(group);
}

// The wanted-th largest entry itself.
template <typename Entries>
__device__ __forceinline__ unsigned long long find_kth(const Entries& entries, int group, int thread,
                                                       int wanted) {
  if (thread == 0) scratch.num_ties = 0;
  narrow<kTies>(entries, group, thread, wanted);
  const unsigned long long low = scratch.low, high = scratch.high;
  entries.each([&](unsigned long long value) {
    if (value >= low && value <= high) scratch.ties[atomicAdd(&scratch.num_ties, 1)] = value;
  });
  group_barrier(group);
  const int num = scratch.num_ties;
  if (thread < num) {
    const unsigned long long mine = scratch.ties[thread];
    int rank = 0;
    for (int i = 0; i < num; ++i) rank += scratch.ties[i] > mine ? 1 : 0;
    if (rank == wanted - 1) scratch.kth = mine;
  }
  group_barrier(group);
  return scratch.kth;
}

// Writes the positions of all entries from `kth` up, ascending: a bitmap sorts them.
template <typename Entries>
__device__ __forceinline__ void write_row(const Entries& entries, int group, int thread,
                                          unsigned long long kth, int begin, int end, int* out) {
  int written = 0;
  for (int window = begin; window < end; window += kWindow) {
    entries.each([&](unsigned long long value) {
      const unsigned int place = (unsigned int)(position_of(value) - window);
      if (value >= kth && place < (unsigned int)kWindow) atomicOr(&scratch.bitmap[place >> 5], 1u << (place & 31));
    });
    group_barrier(group);
    const int num_words = (min(kWindow, end - window) + 31) / 32;
    // An odd number of words a thread keeps the threads of a warp on different banks.
    const int own = ((num_words + kGroupThreads - 1) / kGroupThreads) | 1;
    const int from = min(num_words, thread * own), to = min(num_words, from + own);
    int sum = 0;
    for (int word = from; word < to; ++word) sum += __popc(scratch.bitmap[word]);
    int total;
    int place = written + exclusive_sum(group, thread, sum, total);
    for (int word = from; word < to; ++word) {
      uint32_t bits = scratch.bitmap[word];
      scratch.bitmap[word] = 0;
      while (bits) {
        out[place++] = window + word * 32 + __ffs(bits) - 1;
        bits &= bits - 1;
      }
    }
    written += total;
    group_barrier(group);
  }
}

__device__ __noinline__ void load_queries(const Arguments& a, int tile) {
  for (int piece = threadIdx.x; piece < kColumns * 4; piece += kThreads) {
    const int row = piece >> 2, chunk = piece & 3;
    const int query = 4 * ((row & 7) >> 1) + (row >> 6), head = ((row >> 3) & 7) * 2 + (row & 1);
    const int token = tile * kTile + query;
    const bool is_there = token < a.num_queries;
    const int4* from = reinterpret_cast<const int4*>(a.query + ((int64_t)token * kHeads + head) * kWidth + chunk * 16);
    *reinterpret_cast<int4*>(shared.query + swizzled(row, chunk)) = is_there ? *from : make_int4(0, 0, 0, 0);
  }
  for (int i = threadIdx.x; i < kTile * kHeads; i += kThreads) {
    const int query = i / kHeads, head = i % kHeads, token = tile * kTile + query;
    const float gate = token < a.num_queries ? a.gates[(int64_t)token * kHeads + head] : 0.0f;
    shared.weights[(((query & 3) * 4 + head / 4) * 4 + (query >> 2)) * 4 + (head & 3)] = 0.5f * gate;
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

// Rows that see at most k keys take them all.
__device__ __noinline__ void write_short_rows(const Arguments& a, int tile) {
  for (int query = 0; query < kTile; ++query) {
    const int token = tile * kTile + query;
    if (shared.is_long[query] || token >= a.num_queries) continue;
    const int first = shared.first[query], num = shared.last[query] - first + 1;
    for (int i = threadIdx.x; i < a.k; i += kThreads) a.out[(int64_t)token * a.k + i] = i < num ? first + i : -1;
  }
}

// Leaves at least the k best entries of a list, evenly over its strands, and raises the row's threshold above what can no
// longer be chosen.
__device__ __noinline__ void prune(uint8_t* list, int query, int group, int thread, int k) {
  // One strand may be full while the row holds few entries, where keys of a period stand out: then all are spread anew.
  const bool is_choosing = shared.total[query] > k;
  unsigned long long low = 0;
  if (is_choosing) {
    int wanted = k;
    narrow<kTies>(FromMemory(list, query, thread), group, thread, wanted);
    low = scratch.low;
  }
  const int lane = thread & 31, longest = shared.longest[query];
  if (thread == 0) scratch.num_kept = 0;
  group_barrier(group);
  for (int start = 0; start < longest; start += 4) {
    const int slot = start + (thread >> 5);
    int2 raw[kGroups];
    bool is_kept[kGroups];
#pragma unroll
    for (int from = 0; from < kGroups; ++from) {
      const uint8_t* place = list + (from * kSlots + slot) * kSlotBytes + lane * 8;
      is_kept[from] = slot < shared.count[query][from * kOwners + lane];
      if (is_kept[from]) {
        raw[from] = __ldcg(reinterpret_cast<const int2*>(place));
        is_kept[from] = read_entry(place) >= low;
      }
    }
    // These slots of all strands are read before they are overwritten: what is kept never outruns what was read.
    group_barrier(group);
#pragma unroll
    for (int from = 0; from < kGroups; ++from) {
      if (!is_kept[from]) continue;
      const int number = atomicAdd(&scratch.num_kept, 1);
      const int to = number % kStrands / kOwners, owner = number % kOwners;
      *reinterpret_cast<int2*>(list + (to * kSlots + number / kStrands) * kSlotBytes + owner * 8) = raw[from];
    }
    group_barrier(group);
  }
  if (thread < kStrands) {
    const int kept = scratch.num_kept;
    shared.count[query][thread] = (uint8_t)(kept / kStrands + (thread < kept % kStrands ? 1 : 0));
  }
  if (thread == 0 && is_choosing) {
    // k entries score at least this much and stand before every key to come, which must therefore score more.
    const float limit = from_ordered((uint32_t)(low >> 32));
    shared.threshold[query] = fmaxf(shared.threshold[query], nextafterf(limit, __int_as_float(0x7f800000)));
  }
}

// Looks after the lists when a strand of the block is full; every thread of the block comes here.
__device__ __noinline__ void prune_full_lists(uint8_t* lists, int group, int thread, int k) {
  __syncthreads();
  count_rows();
  __syncthreads();
  for (int query = group; query < kTile; query += kGroups) {
    // A closed row's threshold is no number; its list is complete.
    if (shared.longest[query] > kFullAt && shared.threshold[query] <= __int_as_float(0x7f800000))
      prune(lists + query * kListBytes, query, group, thread, k);
  }
  __syncthreads();
}

// Scores the keys of a pass and appends what passes the thresholds.
template <bool kIsSample>
__device__ __forceinline__ void score(const Pass& pass, uint8_t* lists, Strands& strands, uint32_t& counted, int all_from,
                                      int all_to, int k, int group, int thread) {
  const int num_stages = (pass.num + kStageKeys - 1) / kStageKeys;
  const int num_turns = (num_stages + kGroups * kRound - 1) / (kGroups * kRound) * kRound;
  if (thread == 0) {
#pragma unroll
    for (int ahead = 0; ahead < kStages - 1; ++ahead)
      if (ahead * kGroups + group < num_stages) load_stage(pass, group, counted + ahead, ahead * kGroups + group);
  }
  for (int turn = 0; turn < num_turns; ++turn) {
    const int mine = turn * kGroups + group, next = mine + (kStages - 1) * kGroups;
    if (mine < num_stages) {
      const int stage = counted % kStages;
      // All threads have left the stage before this one: its buffer is free for the next copy.
      group_barrier(group);
      if (thread == 0 && next < num_stages) load_stage(pass, group, counted + kStages - 1, next);
      wait_for(shared_address(&shared.arrived[group][stage]), counted / kStages & 1);
      ++counted;
      const int start = mine * kStageKeys, key = (kIsSample ? 0 : pass.begin) + start;
      const bool is_near_an_end = !kIsSample && (key < all_from || key + kStageKeys - 1 > all_to);
#pragma unroll 1
      for (int half = 0; half < kStageKeys; half += kKeys) {
        float d[128];
        start_products(d, descriptor(shared_address(shared.keys[group][stage]) + half * kWidth),
                       descriptor(shared_address(shared.query)));
        finish_products(d);
        const float* scales = &shared.scales[group][stage][half];
        if (is_near_an_end) {
          append<true>(d, lists, strands, scales, key + half, thread);
        } else {
          append<false>(d, lists, strands, scales, key + half, thread);
        }
      }
    }
    if (!kIsSample && turn % kRound == kRound - 1 && __syncthreads_or(strands.is_one_full(group, thread))) {
      strands.publish_counts(group, thread);
      prune_full_lists(lists, group, thread, k);
      strands.set_counts(group, thread, false);
    }
  }
  strands.publish_counts(group, thread);
  __syncthreads();
  count_rows();
  __syncthreads();
}

// Thresholds that some k + margin keys of each row are expected to pass, from the scores of the sample.
__device__ __noinline__ void set_thresholds(const uint8_t* lists, int sample_rank, int group, int thread) {
  for (int query = group; query < kTile; query += kGroups) {
    if (!shared.is_long[query]) continue;
    int wanted = sample_rank;
    narrow<kNear>(FromRegisters(lists + query * kListBytes, query, thread), group, thread, wanted);
    if (thread == 0) shared.threshold[query] = from_ordered((uint32_t)(scratch.low >> 32));
  }
  __syncthreads();
}

// The rows of this warpgroup: exact selection from their lists.
__device__ __noinline__ void write_long_rows(const Arguments& a, const uint8_t* lists, int tile, int group, int thread) {
  for (int query = group; query < kTile; query += kGroups) {
    if (!shared.is_long[query]) continue;
    const uint8_t* list = lists + query * kListBytes;
    const int first = shared.first[query], last = shared.last[query];
    int* out = a.out + (int64_t)(tile * kTile + query) * a.k;
    if (shared.longest[query] <= kInRegisters * 4) {
      const FromRegisters entries(list, query, thread);
      const unsigned long long kth = find_kth(entries, group, thread, a.k);
      write_row(entries, group, thread, kth, first, last + 1, out);
    } else {
      const FromMemory entries(list, query, thread);
      const unsigned long long kth = find_kth(entries, group, thread, a.k);
      write_row(entries, group, thread, kth, first, last + 1, out);
    }
  }
}

// Closes the rows whose lists are complete and opens those whose threshold was too high; true where there are any.
__device__ __forceinline__ bool must_score_again(int k) {
  if (threadIdx.x == 0) shared.needs_again = 0;
  __syncthreads();
  if (threadIdx.x < kTile && shared.is_long[threadIdx.x]) {
    const bool is_short_of = shared.total[threadIdx.x] < k;
    shared.threshold[threadIdx.x] = is_short_of ? -__int_as_float(0x7f800000) : __int_as_float(0x7fffffff);
    if (is_short_of) shared.needs_again = 1;
    for (int strand = 0; is_short_of && strand < kStrands; ++strand) shared.count[threadIdx.x][strand] = 0;
  }
  __syncthreads();
  return shared.needs_again;
}

// The sampled key of every stride keys: as good as random, and the same on every run.
__device__ __forceinline__ int sampled_key(int number, int stride) {
  uint32_t mixed = (uint32_t)number * 2654435761u;
  mixed ^= mixed >> 15;
  mixed *= 2246822519u;
  return number * stride + (int)((mixed >> 13) & (uint32_t)(stride - 1));
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

__global__ void __launch_bounds__(kThreads, 1) select_kernel(const __grid_constant__ Arguments a) {
  const int group = threadIdx.x / kGroupThreads, thread = threadIdx.x % kGroupThreads;
  uint8_t* lists = a.lists + blockIdx.x * kTile * kListBytes;
  for (int i = thread; i < kBins; i += kGroupThreads) scratch.bins[i] = 0;
  for (int i = thread; i < kWindow / 32; i += kGroupThreads) scratch.bitmap[i] = 0;
  uint32_t counted = 0;
  if (thread == 0) {
    for (int stage = 0; stage < kStages; ++stage)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&shared.arrived[group][stage])) : "memory");
    publish_to_wgmma();
  }
  const int num_tiles = (a.num_queries + kTile - 1) / kTile;
  // The last tiles see the most keys and begin first.
  for (int number = blockIdx.x; number < num_tiles; number += gridDim.x) {
    const int tile = num_tiles - 1 - number;
    load_queries(a, tile);
    write_short_rows(a, tile);
    // Bounds over the rows that select: from begin to end somebody sees a key, from all_from to all_to everybody does.
    int begin = a.num_keys, end = 0, all_from = 0, all_to = a.num_keys;
    for (int query = 0; query < kTile; ++query) {
      if (!shared.is_long[query]) continue;
      begin = min(begin, shared.first[query]);
      end = max(end, shared.last[query] + 1);
      all_from = max(all_from, shared.first[query]);
      all_to = min(all_to, shared.last[query]);
    }
    // A row that takes no part is closed by a threshold that no score compares with.
    if (threadIdx.x < kTile)
      shared.threshold[threadIdx.x] = shared.is_long[threadIdx.x] ? -__int_as_float(0x7f800000) : __int_as_float(0x7fffffff);
    __syncthreads();
    if (begin >= end) continue;
    // The part of the sample that every row sees, in whole eights and stages.
    const int sample_begin = (all_from + a.stride - 1) / a.stride + 7 & ~7;
    const int num_sampled = max(0, (all_to + 1) / a.stride - sample_begin) / kStageKeys * kStageKeys;
    const float expected = (float)a.k / a.stride;
    const int sample_rank = (int)(expected + 6.0f * sqrtf(expected) + 4.0f);
    Strands strands;
    strands.set_counts(group, thread, true);
    if (all_to - all_from >= kSampleAbove && sample_rank < num_sampled) {
      const Pass sample{a.sample, a.sample_scales, sample_begin, num_sampled};
      score<true>(sample, lists, strands, counted, 0, 0, a.k, group, thread);
      set_thresholds(lists, sample_rank, group, thread);
      strands.set_counts(group, thread, true);
    }
    const Pass all{a.keys, a.scales, begin & ~7, end - (begin & ~7)};
    do {
      score<false>(all, lists, strands, counted, all_from, all_to, a.k, group, thread);
      if (!must_score_again(a.k)) break;
      strands.set_counts(group, thread, false);
    } while (true);
    write_long_rows(a, lists, tile, group, thread);
    __syncthreads();
  }
}

}  // namespace

extern "C" {

// Bytes of scratch a block needs.
int64_t indexer_select_scratch_bytes() { return kTile * kListBytes; }

int indexer_select_max_k() { return kFullAt * kStrands / 2; }

// Keys of the sample, and one of how many it is: at most kSampled of a whole context.
static int sample_stride(int num_keys) {
  int stride = 16;
  while (num_keys / stride > kSampled) stride *= 2;
  return stride;
}

// Bytes of scratch for the arranged keys and their sample.
int64_t indexer_select_arranged_bytes(int num_keys) {
  return ((int64_t)num_keys + num_keys / sample_stride(num_keys) + 2 * kPadding + 4) * (kWidth + 4);
}

// Selects the k best keys of every query. All pointers are on the device and aligned to 16 bytes; `lists` holds num_blocks
// times the scratch bytes of a block.
int indexer_select(const void* query, const float* gates, const void* keys, const float* scales, const void* first,
                   const void* last, int are_wide, int num_queries, int num_keys, int k, int* out, void* arranged,
                   void* lists, int num_blocks, cudaStream_t stream) {
  const int bytes = sizeof(Shared), stride = sample_stride(num_keys), num_sampled = num_keys / stride;
  const cudaError_t error = cudaFuncSetAttribute(select_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return (int)error;
  uint8_t* arranged_keys = (uint8_t*)arranged;
  uint8_t* sample = arranged_keys + ((int64_t)num_keys + kPadding) * kWidth;
  float* sample_scales = (float*)(sample + ((int64_t)num_sampled + kPadding) * kWidth);
  float* arranged_scales = sample_scales + (num_sampled + kPadding + 3) / 4 * 4;
  const int64_t num_pieces = ((int64_t)num_keys + num_sampled) * 4;
  arrange_kernel<<<(unsigned)((num_pieces + 255) / 256), 256, 0, stream>>>(
      (const uint8_t*)keys, scales, num_keys, stride, arranged_keys, arranged_scales, sample, sample_scales);
  const Arguments arguments{(const uint8_t*)query, gates, arranged_keys, arranged_scales, sample, sample_scales, stride,
                            first, last, are_wide, num_queries, num_keys, k, out, (uint8_t*)lists};
  select_kernel<<<num_blocks, kThreads, bytes, stream>>>(arguments);
  return (int)cudaGetLastError();
}

}
