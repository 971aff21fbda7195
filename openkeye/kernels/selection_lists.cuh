// Lists of what may still be chosen, and choosing from them: the part of `indexer_select.cu` without a Hopper instruction, which
// tests run on a CPU too (tests/kernels/emulation).
//
// A row's list has a strand for each thread that meets the row's scores. An entry is a position and a score; a strand's entries
// lie kSlotBytes apart, so that a warp reads a slot of 32 strands at once. Whoever includes this declares group_barrier(group),
// a barrier of the kGroupThreads threads of a warpgroup.

#pragma once

namespace {

constexpr int kParts = 2;                   // of a list: warpgroups that meet a row's scores
constexpr int kGroupThreads = 128;
constexpr int kGroupWarps = kGroupThreads / 32;
constexpr int kOwners = 32;                // strands of a part
constexpr int kStrands = kParts * kOwners;
constexpr int kSlots = 120;                // entries of a strand
constexpr int kSlotBytes = kOwners * 8;    // between the entries of a strand: a warp reads 32 strands at once
constexpr int64_t kListBytes = (int64_t)kParts * kSlots * kSlotBytes;
constexpr int kBins = 2048;
constexpr int kTies = 128;                 // entries of a bin that are ranked by comparing all pairs
constexpr int kWindow = 131072;            // positions of the bitmap that sorts a selection
constexpr int kMaxK = 3328;                // less than half of what a list holds, so that a pruned one has room again

// What a warpgroup needs to select from a list.
struct GroupScratch {
  uint32_t bins[kBins];
  unsigned long long ties[kTies];
  unsigned long long kth;
  uint32_t warp_values[2][kGroupWarps];
  int bin, above, in_bin, num_ties, num_kept;
};

struct SelectorMemory {
  GroupScratch scratch;
  alignas(16) uint32_t bitmap[kWindow / 32];
  alignas(16) int selected[kMaxK];
};

static_assert(sizeof(SelectorMemory) <= 49152, "more shared memory would have to be asked for");

__device__ __forceinline__ uint32_t ordered(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);
  return (bits >> 31) ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float from_ordered(uint32_t bits) {
  return __uint_as_float((bits >> 31) ? bits & 0x7fffffffu : ~bits);
}

// A row's list as a lane sees it: where it is, how many entries the lane's strands have, and the longest and the sum of all.
struct List {
  const uint8_t* entries;
  int counts[kParts];
  int longest, total;
};

__device__ __forceinline__ List view_list(const uint8_t* entries, const uint8_t* counts) {
  List list;
  list.entries = entries;
  int most = 0, sum = 0;
#pragma unroll
  for (int from = 0; from < kParts; ++from) {
    list.counts[from] = counts[from * kOwners + (threadIdx.x & 31)];
    most = max(most, list.counts[from]);
    sum += list.counts[from];
  }
  list.longest = __reduce_max_sync(~0u, most);
  list.total = __reduce_add_sync(~0u, sum);
  return list;
}

// The entries of a list for a warpgroup: scores in its registers, ordered as unsigned numbers, and complements of positions,
// which are read anew where they are asked for unless kHolds: half the registers, twice the warps under way. each(visit) calls
// visit(score, complement) for every one; complement() gives the number.
template <int kMostSlots, bool kHolds = false>
struct Entries {
  static constexpr int kEach = kMostSlots / kGroupWarps;
  const uint8_t* own;
  uint32_t scores[kParts][kEach], complements[kParts][kHolds ? kEach : 1];
  __device__ __forceinline__ Entries(const List& list, int thread)
      : own(list.entries + (thread >> 5) * kSlotBytes + (thread & 31) * 8) {
#pragma unroll
    for (int from = 0; from < kParts; ++from) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const bool is_there = i * kGroupWarps + (thread >> 5) < list.counts[from];
        int2 raw = make_int2(0, 0);
        if (is_there) raw = __ldcg(place(from, i));
        // No score is ordered as zero.
        scores[from][i] = is_there ? ordered(__int_as_float(raw.y)) : 0u;
        if (kHolds) complements[from][i] = ~(uint32_t)raw.x;
      }
    }
  }
  __device__ __forceinline__ const int2* place(int from, int i) const {
    return reinterpret_cast<const int2*>(own + (from * kSlots + i * kGroupWarps) * kSlotBytes);
  }
  template <typename Visit>
  __device__ __forceinline__ void each(Visit visit) const {
#pragma unroll
    for (int from = 0; from < kParts; ++from)
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        if (scores[from][i])
          visit(scores[from][i], [&] { return kHolds ? complements[from][i] : ~(uint32_t)__ldcg(place(from, i)).x; });
  }
};

// Sum over the warpgroup of everything before this thread; `total` is the whole sum.
__device__ __forceinline__ int exclusive_sum(GroupScratch& scratch, int group, int thread, int value, int& total) {
  int sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, sum, step);
    if ((thread & 31) >= step) sum += other;
  }
  if ((thread & 31) == 31) scratch.warp_values[0][thread >> 5] = (uint32_t)sum;
  group_barrier(group);
  int before = 0;
  total = 0;
#pragma unroll
  for (int warp = 0; warp < kGroupWarps; ++warp) {
    before += warp < (thread >> 5) ? (int)scratch.warp_values[0][warp] : 0;
    total += (int)scratch.warp_values[0][warp];
  }
  group_barrier(group);
  return before + sum - value;
}

struct Range {
  uint32_t low, high;
  int count;
};

// Of 2,048 bins between the smallest and largest number the one in which the wanted-th largest lies, refined until it holds at
// most kFew numbers or one number only; `wanted` becomes the rank inside it. each(visit) names the numbers. The bins are zero
// before and after.
template <int kFew, typename Each>
__device__ __forceinline__ Range narrow(Each each, GroupScratch& scratch, int group, int thread, int& wanted) {
  uint32_t largest = 0, smallest = ~0u;
  each([&](uint32_t value) {
    largest = max(largest, value);
    smallest = min(smallest, value);
  });
  largest = __reduce_max_sync(~0u, largest);
  smallest = __reduce_min_sync(~0u, smallest);
  if ((thread & 31) == 0) {
    scratch.warp_values[0][thread >> 5] = largest;
    scratch.warp_values[1][thread >> 5] = smallest;
  }
  group_barrier(group);
#pragma unroll
  for (int warp = 0; warp < kGroupWarps; ++warp) {
    largest = max(largest, scratch.warp_values[0][warp]);
    smallest = min(smallest, scratch.warp_values[1][warp]);
  }
  group_barrier(group);
  Range range{smallest, largest, 0};
  for (;;) {
    const uint32_t width = range.high - range.low;
    const int bits = 32 - __clz(width), shift = bits > 11 ? bits - 11 : 0;
    each([&](uint32_t value) {
      // What lies below the range wraps around to above it.
      if (value - range.low <= width) atomicAdd(&scratch.bins[(value - range.low) >> shift], 1u);
    });
    group_barrier(group);
    // The first thread looks at the largest bins.
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
    int above = exclusive_sum(scratch, group, thread, sum, total);
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
    range.low += (uint32_t)scratch.bin << shift;
    range.high = range.low + min(range.high - range.low, (1u << shift) - 1);
    range.count = scratch.in_bin;
    wanted -= scratch.above;
    group_barrier(group);
    if (range.count <= kFew || shift == 0) return range;
  }
}

// The few entries among which the wanted-th best lies: by their scores, and where too many are equal by their positions too.
struct Cut {
  Range scores, complements;
  __device__ __forceinline__ bool may_hold(uint32_t score) const { return score >= scores.low && score <= scores.high; }
  __device__ __forceinline__ bool holds(uint32_t complement) const {
    return complement >= complements.low && complement <= complements.high;
  }
};

template <int kFew, int kMostSlots, bool kHolds>
__device__ __forceinline__ Cut cut_list(const Entries<kMostSlots, kHolds>& entries, GroupScratch& scratch, int group, int thread,
                                        int& wanted) {
  Cut cut;
  cut.scores = narrow<kFew>(
      [&](auto visit) { entries.each([&](uint32_t score, auto) { visit(score); }); }, scratch, group, thread, wanted);
  cut.complements = Range{0, ~0u, cut.scores.count};
  if (cut.scores.count > kFew) {
    const uint32_t equal = cut.scores.low;
    cut.complements = narrow<kFew>(
        [&](auto visit) {
          entries.each([&](uint32_t score, auto complement) {
            if (score == equal) visit(complement());
          });
        },
        scratch, group, thread, wanted);
  }
  return cut;
}

// Writes the positions of the k best entries, ascending: a bitmap sorts them. It is zero before and after.
template <int kMostSlots>
__device__ __forceinline__ void write_row(const Entries<kMostSlots>& entries, SelectorMemory& memory, int thread, int begin,
                                          int end, int k, int* out) {
  GroupScratch& scratch = memory.scratch;
  int wanted = k;
  if (thread == 0) scratch.num_ties = 0;
  const Cut cut = cut_list<kTies>(entries, scratch, 0, thread, wanted);
  entries.each([&](uint32_t score, auto complement) {
    if (!cut.may_hold(score)) return;
    const uint32_t its = complement();
    if (cut.holds(its)) scratch.ties[atomicAdd(&scratch.num_ties, 1)] = ((unsigned long long)score << 32) | its;
  });
  __syncthreads();
  const int num_ties = scratch.num_ties;
  if (thread < num_ties) {
    const unsigned long long mine = scratch.ties[thread];
    int rank = 0;
    for (int i = 0; i < num_ties; ++i) rank += scratch.ties[i] > mine ? 1 : 0;
    if (rank == wanted - 1) scratch.kth = mine;
  }
  __syncthreads();
  const uint32_t kth_score = (uint32_t)(scratch.kth >> 32), kth_complement = (uint32_t)scratch.kth;
  int written = 0;
  for (int window = begin; window < end; window += kWindow) {
    entries.each([&](uint32_t score, auto complement) {
      if (score < kth_score) return;
      const uint32_t its = complement(), place = ~its - (uint32_t)window;
      const bool is_chosen = score > kth_score || its >= kth_complement;
      if (is_chosen && place < (uint32_t)kWindow) atomicOr(&memory.bitmap[place >> 5], 1u << (place & 31));
    });
    __syncthreads();
    const int num_words = (min(kWindow, end - window) + 31) / 32;
    // An odd number of words a thread keeps the threads of a warp on different banks.
    const int own = ((num_words + kGroupThreads - 1) / kGroupThreads) | 1;
    const int from = min(num_words, thread * own), to = min(num_words, from + own);
    int sum = 0;
    for (int word = from; word < to; ++word) sum += __popc(memory.bitmap[word]);
    int total;
    int place = written + exclusive_sum(scratch, 0, thread, sum, total);
    for (int word = from; word < to; ++word) {
      uint32_t bits = memory.bitmap[word];
      memory.bitmap[word] = 0;
      while (bits) {
        memory.selected[place++] = window + word * 32 + __ffs(bits) - 1;
        bits &= bits - 1;
      }
    }
    written += total;
    __syncthreads();
  }
  for (int i = thread; i < k; i += kGroupThreads) out[i] = memory.selected[i];
}

// Leaves at least the k best entries of a list, evenly over its strands, and raises the row's threshold above what can no
// longer be chosen; for a warpgroup.
__device__ __forceinline__ void prune(uint8_t* list_bytes, uint8_t* counts, float* threshold, GroupScratch& scratch, int group,
                                      int thread, int k) {
  const List list = view_list(list_bytes, counts);
  const Entries<kSlots, true> entries(list, thread);
  // One strand may be full while the row holds few entries, where keys of a period stand out: then all are spread anew.
  uint32_t low = 0, low_complement = 0;
  const bool is_choosing = list.total > k;
  if (is_choosing) {
    int wanted = k;
    const Cut cut = cut_list<kTies>(entries, scratch, group, thread, wanted);
    low = cut.scores.low;
    low_complement = cut.complements.low;
  }
  if (thread == 0) scratch.num_kept = 0;
  // Everything is in registers before any of it is overwritten.
  group_barrier(group);
  entries.each([&](uint32_t score, auto complement) {
    if (score < low || (score == low && complement() < low_complement)) return;
    const int number = atomicAdd(&scratch.num_kept, 1);
    const int slot = number / kStrands, to = number % kStrands / kOwners, owner = number % kOwners;
    const int2 raw = make_int2((int)~complement(), __float_as_int(from_ordered(score)));
    *reinterpret_cast<int2*>(list_bytes + (to * kSlots + slot) * kSlotBytes + owner * 8) = raw;
  });
  group_barrier(group);
  if (thread < kStrands) {
    const int kept = scratch.num_kept;
    counts[thread] = (uint8_t)(kept / kStrands + (thread < kept % kStrands ? 1 : 0));
  }
  if (thread == 0 && is_choosing) {
    // k entries score at least this much and stand before every key to come, which must therefore score more.
    const float limit = from_ordered(low);
    *threshold = fmaxf(*threshold, nextafterf(limit, __int_as_float(0x7f800000)));
  }
  group_barrier(group);
}

}  // namespace
