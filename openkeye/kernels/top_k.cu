// Exact, deterministic top-k positions of float32 rows on Hopper: ties to the smaller position, positions ascending.
//
// Twin: reference.top_k_positions. Scores are compared as unsigned numbers that order as the floats do, both zeros alike.
// Columns at or past a row's num_valid are never read. NaN among the valid columns is not served: it does no harm beyond
// its own row.
//
// Two kernels. `select_rows`: one block a row, one read of the row. A sample of the row gives a threshold that somewhat more
// than k scores should reach; the row is streamed once and what reaches the threshold is kept in shared memory. When that
// memory is full, the k best so far stay and the threshold rises to the last of them, which is always right; when the sample
// promised too much and fewer than k scores arrived, the row is streamed again without a threshold.
// `select_clusters`: a cluster of blocks a row, each holding its slice of the row in shared memory, for few rows.

#include <cooperative_groups.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>

#include <utility>

namespace {

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;
constexpr int VECTOR = 4;
constexpr int DIGIT_BITS = 11;
constexpr int BINS = 1 << DIGIT_BITS;
constexpr int MAX_K = 4096;
// Column numbers of a round that reaches beyond the row still fit 32 bits.
constexpr int MAX_COLUMNS = 1 << 30;

// select_rows
constexpr int CAPACITY = 8192;
constexpr int UNROLL = 3;
constexpr int STEP = THREADS * VECTOR;
constexpr int ROUND = STEP * UNROLL;
constexpr int NUM_SAMPLES = 4096;
constexpr int SAMPLE_FROM = 8 * NUM_SAMPLES;
constexpr int WINDOW = 32 * CAPACITY;
static_assert(ROUND <= CAPACITY && MAX_K + STEP <= CAPACITY && 2 * MAX_K <= CAPACITY, "a step must fit beside the k best");
static_assert(WINDOW / 64 * sizeof(uint16_t) <= BINS * sizeof(uint32_t), "the prefixes of a window take the histogram's place");
static_assert(BINS == 4 * THREADS, "every thread looks at four bins");

// select_clusters
constexpr int MAX_CLUSTER = 16;
constexpr int SLICE_UNROLL = 4;
constexpr uint32_t ORDERED_MINUS_INFINITY = 0x007FFFFFu;
constexpr int NUM_DIGITS = 3;

struct Rows {
    const float* scores;
    const void* num_valid;
    int* indices;
    int64_t row_stride;
    int64_t indices_stride;
    int num_columns;
    int k;
    int is_valid_long;
};

// A digit of the number that is sought, its rank among the numbers with this digit, and how many of them there are.
struct Found {
    uint32_t digit;
    uint32_t rank;
    uint32_t count;
};

// Chosen are the ordered scores above `bits`, and those equal to it whose complemented position is at least `complement`.
struct Threshold {
    uint32_t bits;
    uint32_t complement;
};

struct RowMemory {
    // the candidates
    float scores[CAPACITY];
    uint32_t positions[CAPACITY];
    uint32_t histogram[BINS];
    uint32_t warp_sums[WARPS];
    uint32_t num_kept;
    Found found;
};

// The row's slice follows in vectors.
struct alignas(sizeof(uint4)) ClusterMemory {
    uint32_t histogram[BINS];
    uint32_t totals[NUM_DIGITS][BINS];
    uint32_t warp_sums[WARPS];
    uint32_t block_counts[MAX_CLUSTER];
    Found found;
};

extern __shared__ uint4 dynamic_memory[];

__device__ __forceinline__ RowMemory& row_memory() {
    return *reinterpret_cast<RowMemory*>(dynamic_memory);
}

__device__ __forceinline__ uint32_t to_ordered(float score) {
    // Adding zero turns -0.0 into 0.0.
    const uint32_t bits = __float_as_uint(score + 0.0f);
    return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

__device__ __forceinline__ float from_ordered(uint32_t ordered) {
    return __uint_as_float((ordered & 0x80000000u) ? ordered ^ 0x80000000u : ~ordered);
}

__device__ __forceinline__ int row_length(const Rows& rows, int row) {
    const int64_t valid = rows.is_valid_long ? static_cast<const int64_t*>(rows.num_valid)[row]
                                             : static_cast<const int32_t*>(rows.num_valid)[row];
    return static_cast<int>(valid < 0 ? 0 : valid < rows.num_columns ? valid : rows.num_columns);
}

__device__ __forceinline__ uint32_t warp_inclusive_sum(uint32_t value) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const uint32_t other = __shfl_up_sync(~0u, value, distance);
        value += lane >= distance ? other : 0u;
    }
    return value;
}

// The sum over the threads before this one. A barrier must lie between two uses of warp_sums.
__device__ __forceinline__ uint32_t block_exclusive_sum(uint32_t own, uint32_t* warp_sums) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const uint32_t inclusive = warp_inclusive_sum(own);
    if (lane == 31) warp_sums[warp] = inclusive;
    __syncthreads();
    const uint32_t before = __reduce_add_sync(~0u, lane < warp ? warp_sums[lane] : 0u);
    return before + inclusive - own;
}

// The digit of the rank-th largest number, out of the counts of all digits, which are cleared. A barrier comes before it.
__device__ __forceinline__ Found find_digit(uint32_t* counts, uint32_t* warp_sums, Found* found, uint32_t rank) {
    // The first thread looks at the four largest digits.
    const int first = BINS - VECTOR - VECTOR * static_cast<int>(threadIdx.x);
    uint4* own_counts = reinterpret_cast<uint4*>(counts + first);
    const uint4 own = *own_counts;
    *own_counts = make_uint4(0, 0, 0, 0);
    const uint32_t sum = own.x + own.y + own.z + own.w;
    uint32_t larger = block_exclusive_sum(sum, warp_sums);
    if (larger < rank && rank <= larger + sum) {
        uint32_t digit = first + 3, count = own.w;
        if (larger + count < rank) larger += count, digit = first + 2, count = own.z;
        if (larger + count < rank) larger += count, digit = first + 1, count = own.y;
        if (larger + count < rank) larger += count, digit = first, count = own.x;
        *found = Found{digit, rank - larger, count};
    }
    __syncthreads();
    return *found;
}

// A number that the rank-th largest of the keys and all larger ones reach and no other key does, unless it equals the
// rank-th: then last->count - last->rank keys are too many. Keys are the ordered scores, or, where TIES, the complemented
// positions of the scores equal to `equal_to`.
template <bool TIES>
__device__ __forceinline__ uint32_t radix_select(uint32_t count, uint32_t rank, uint32_t equal_to, Found* last) {
    RowMemory& memory = row_memory();
    uint32_t prefix = 0;
    int low = 32;
    while (true) {
        const int width = low < DIGIT_BITS ? low : DIGIT_BITS;
        low -= width;
        for (uint32_t i = threadIdx.x; i < count; i += THREADS) {
            const uint32_t ordered = to_ordered(memory.scores[i]);
            const uint32_t key = TIES ? ~memory.positions[i] : ordered;
            bool is_counted = !TIES || ordered == equal_to;
            if (low + width < 32) is_counted = is_counted && (key >> (low + width)) == prefix;
            if (is_counted) atomicAdd(&memory.histogram[(key >> low) & ((1u << width) - 1)], 1u);
        }
        __syncthreads();
        *last = find_digit(memory.histogram, memory.warp_sums, &memory.found, rank);
        rank = last->rank;
        prefix = (prefix << width) | last->digit;
        if (low == 0 || last->count == last->rank) return prefix << low;
    }
}

// The place of this thread's `own` entries in a list that all threads append to.
__device__ __forceinline__ uint32_t reserve(uint32_t own, uint32_t* length) {
    const uint32_t inclusive = warp_inclusive_sum(own);
    uint32_t base = 0;
    if ((threadIdx.x & 31) == 31) {
        // One thread of a warp: the compiler's own gathering of a warp's additions would only cost.
        const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(length));
        asm volatile("atom.relaxed.cta.shared::cta.add.u32 %0, [%1], %2;"
                     : "=r"(base)
                     : "r"(address), "r"(inclusive)
                     : "memory");
    }
    return __shfl_sync(~0u, base, 31) + inclusive - own;
}

// Keeps the k best of the `count` candidates, in any order; the score of the last of them, or somewhat less, comes back.
__device__ __noinline__ uint32_t keep_best(uint32_t count, uint32_t k) {
    RowMemory& memory = row_memory();
    Found last;
    Threshold threshold;
    threshold.bits = radix_select<false>(count, k, 0, &last);
    threshold.complement = 0;
    if (last.count > last.rank) {
        threshold.complement = radix_select<true>(count, last.rank, threshold.bits, &last);
    }
    if (threadIdx.x == 0) memory.num_kept = 0;
    constexpr int BATCH = 4;
    for (uint32_t start = 0; start < count; start += BATCH * THREADS) {
        float scores[BATCH];
        uint32_t positions[BATCH], num_taken = 0;
        bool is_taken[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
            const uint32_t i = start + j * THREADS + threadIdx.x;
            is_taken[j] = false;
            if (i < count) {
                scores[j] = memory.scores[i];
                positions[j] = memory.positions[i];
                const uint32_t ordered = to_ordered(scores[j]);
                is_taken[j] = ordered > threshold.bits || (ordered == threshold.bits && ~positions[j] >= threshold.complement);
            }
            num_taken += is_taken[j];
        }
        // What is written now goes where everything has been read.
        __syncthreads();
        uint32_t slot = reserve(num_taken, &memory.num_kept);
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
            if (is_taken[j]) {
                memory.scores[slot] = scores[j];
                memory.positions[slot] = positions[j];
                ++slot;
            }
        }
    }
    __syncthreads();
    return threshold.bits;
}

// A row as vectors of four columns that are aligned in memory; the first and the last may reach beyond the row.
struct Row {
    const float* line;
    int length;
    // how many columns of the first vector lie before the row
    int skew;

    __device__ __forceinline__ bool is_inside(int first_vector, int end_vector) const {
        return (first_vector > 0 || skew == 0) && end_vector * VECTOR - skew <= length;
    }

    // Only where is_inside.
    __device__ __forceinline__ float4 load(int vector) const {
        return __ldcs(reinterpret_cast<const float4*>(line + (vector * VECTOR - skew)));
    }

    // Columns outside of the row come as NaN, which reaches no threshold.
    __device__ __forceinline__ float4 load_edge(int vector) const {
        const int column = vector * VECTOR - skew;
        float values[VECTOR];
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) {
            const bool is_valid = column + j >= 0 && column + j < length;
            values[j] = is_valid ? __ldcs(line + column + j) : __uint_as_float(0x7FFFFFFFu);
        }
        return make_float4(values[0], values[1], values[2], values[3]);
    }
};

__device__ __forceinline__ Row open_row(const Rows& rows, int row) {
    const float* line = rows.scores + row * rows.row_stride;
    const int skew = static_cast<int>((reinterpret_cast<uintptr_t>(line) / sizeof(float)) % VECTOR);
    return Row{line, row_length(rows, row), skew};
}

// Appends those of N vectors' scores that reach the threshold; vector n begins at column + n * STEP. Where they do not all
// fit, num_kept says so afterwards, and nothing beyond the memory was written.
template <int N>
__device__ __forceinline__ void append(const float4 (&vectors)[N], int column, float threshold) {
    RowMemory& memory = row_memory();
    uint32_t reached = 0;
#pragma unroll
    for (int n = 0; n < N; ++n) {
        reached |= (vectors[n].x >= threshold ? 1u : 0u) << (VECTOR * n);
        reached |= (vectors[n].y >= threshold ? 1u : 0u) << (VECTOR * n + 1);
        reached |= (vectors[n].z >= threshold ? 1u : 0u) << (VECTOR * n + 2);
        reached |= (vectors[n].w >= threshold ? 1u : 0u) << (VECTOR * n + 3);
    }
    const uint32_t num_reached = __popc(reached);
    uint32_t slot = reserve(num_reached, &memory.num_kept);
    if (slot + num_reached > CAPACITY) return;
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const float values[VECTOR] = {vectors[n].x, vectors[n].y, vectors[n].z, vectors[n].w};
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) {
            if (reached & (1u << (VECTOR * n + j))) {
                memory.scores[slot] = values[j];
                memory.positions[slot] = column + n * STEP + j;
                ++slot;
            }
        }
    }
}

// A score that by a sample of the row somewhat more than k scores reach; -inf where the row is short.
__device__ __forceinline__ float sample_threshold(const Row& row, uint32_t k) {
    if (row.length < SAMPLE_FROM) return -INFINITY;
    RowMemory& memory = row_memory();
    // 64 bytes out of every stretch of the row, at a place that differs from stretch to stretch.
    constexpr int UNIT = 4;
    constexpr int NUM_UNITS = NUM_SAMPLES / (UNIT * VECTOR);
    const int first_inside = row.skew ? 1 : 0;
    const int num_inside = (row.length + row.skew) / VECTOR - first_inside;
    const uint32_t stretch = num_inside / UNIT / NUM_UNITS;
#pragma unroll
    for (int j = 0; j < NUM_SAMPLES / STEP; ++j) {
        const uint32_t unit = j * (THREADS / UNIT) + threadIdx.x / UNIT;
        const uint32_t place = unit * stretch + __umulhi(unit * 2654435761u, stretch);
        const int vector = first_inside + static_cast<int>(place * UNIT + threadIdx.x % UNIT);
        const float4 scores = __ldg(reinterpret_cast<const float4*>(row.line + vector * VECTOR - row.skew));
        reinterpret_cast<float4*>(memory.scores)[j * THREADS + threadIdx.x] = scores;
    }
    __syncthreads();
    // As many as lie midway between k and what fits, but never fewer than six standard deviations above k.
    const float share = static_cast<float>(NUM_SAMPLES) / row.length;
    const float expected = k * share;
    const float rank = fmaxf(sqrtf(static_cast<float>(k) * CAPACITY) * share, expected + 6.0f * sqrtf(expected) + 4.0f);
    Found last;
    return from_ordered(radix_select<false>(NUM_SAMPLES, static_cast<uint32_t>(rank), 0, &last));
}

// Streams the row; afterwards the candidates hold its k best and perhaps more, unless fewer than k reached the threshold.
__device__ __forceinline__ uint32_t stream_row(const Row& row, uint32_t k, float threshold) {
    RowMemory& memory = row_memory();
    const int num_vectors = (row.length + row.skew + VECTOR - 1) / VECTOR;
    uint32_t num_kept = 0;
    if (threadIdx.x == 0) memory.num_kept = 0;
    for (int start = 0; start < num_vectors; start += UNROLL * THREADS) {
        const int first = start + static_cast<int>(threadIdx.x);
        const int column = first * VECTOR - row.skew;
        float4 vectors[UNROLL];
        if (row.is_inside(start, start + UNROLL * THREADS)) {
#pragma unroll
            for (int n = 0; n < UNROLL; ++n) vectors[n] = row.load(first + n * THREADS);
        } else {
#pragma unroll
            for (int n = 0; n < UNROLL; ++n) vectors[n] = row.load_edge(first + n * THREADS);
        }
        // Everyone has seen the length before it changes.
        __syncthreads();
        append(vectors, column, threshold);
        __syncthreads();
        if (memory.num_kept <= CAPACITY) {
            num_kept = memory.num_kept;
            continue;
        }
        // Too many: go through this round once more, in steps that always fit beside the k best.
        __syncthreads();
        if (threadIdx.x == 0) memory.num_kept = num_kept;
#pragma unroll 1
        for (int n = 0; n < UNROLL; ++n) {
            if (num_kept > CAPACITY - STEP) {
                // Later columns lose against equal earlier ones: only what is larger than the k-th so far can still enter.
                threshold = from_ordered(keep_best(num_kept, k) + 1);
                num_kept = k;
            }
            const float4 again[1] = {row.load_edge(first + n * THREADS)};
            __syncthreads();
            append(again, column + n * STEP, threshold);
            __syncthreads();
            num_kept = memory.num_kept;
        }
    }
    return num_kept;
}

// Writes the positions of the first num_kept <= k candidates in ascending order, then -1.
__device__ __forceinline__ void write_ascending(int length, uint32_t num_kept, uint32_t k, int* out) {
    RowMemory& memory = row_memory();
    // One bit a column, a window of the row at a time; the rank of a position is the number of bits before it.
    uint32_t* bitmap = reinterpret_cast<uint32_t*>(memory.scores);
    uint64_t* groups = reinterpret_cast<uint64_t*>(memory.scores);
    uint16_t* before = reinterpret_cast<uint16_t*>(memory.histogram);
    uint32_t* sorted = memory.positions + MAX_K;
    uint32_t num_written = 0;
    for (int window = 0; window < length; window += WINDOW) {
        const int num_groups = (min(WINDOW, length - window) + 63) / 64;
        for (int i = threadIdx.x; i < num_groups; i += THREADS) groups[i] = 0;
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < num_kept; i += THREADS) {
            const uint32_t place = memory.positions[i] - window;
            if (place < WINDOW) atomicOr(&bitmap[place / 32], 1u << (place % 32));
        }
        __syncthreads();
        const int groups_each = (num_groups + THREADS - 1) / THREADS;
        const int first = min(static_cast<int>(threadIdx.x) * groups_each, num_groups);
        const int end = min(first + groups_each, num_groups);
        uint32_t own = 0;
        for (int group = first; group < end; ++group) own += __popcll(groups[group]);
        uint32_t sum = block_exclusive_sum(own, memory.warp_sums);
        for (int group = first; group < end; ++group) {
            before[group] = static_cast<uint16_t>(sum);
            sum += __popcll(groups[group]);
        }
        if (threadIdx.x == THREADS - 1) memory.num_kept = sum;
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < num_kept; i += THREADS) {
            const uint32_t position = memory.positions[i];
            const uint32_t place = position - window;
            if (place < WINDOW) {
                const uint64_t earlier = groups[place / 64] & ((1ull << (place % 64)) - 1);
                sorted[num_written + before[place / 64] + __popcll(earlier)] = position;
            }
        }
        num_written += memory.num_kept;
        __syncthreads();
    }
    for (uint32_t i = threadIdx.x; i < k; i += THREADS) out[i] = i < num_written ? static_cast<int>(sorted[i]) : -1;
}

__global__ void __launch_bounds__(THREADS, 3) select_rows(const Rows rows) {
    RowMemory& memory = row_memory();
    const Row row = open_row(rows, blockIdx.x);
    int* out = rows.indices + blockIdx.x * rows.indices_stride;
    const uint32_t k = rows.k;
    if (row.length <= rows.k) {
        for (int i = threadIdx.x; i < rows.k; i += THREADS) out[i] = i < row.length ? i : -1;
        return;
    }
    for (int i = threadIdx.x; i < BINS; i += THREADS) memory.histogram[i] = 0;
    __syncthreads();
    float threshold = sample_threshold(row, k);
    uint32_t num_kept;
    while (true) {
        num_kept = stream_row(row, k, threshold);
        if (num_kept >= k || threshold == -INFINITY) break;
        // The sample promised too much.
        threshold = -INFINITY;
        __syncthreads();
    }
    if (num_kept > k) {
        keep_best(num_kept, k);
        num_kept = k;
    }
    write_ascending(row.length, num_kept, k, out);
}

// The same place in the shared memory of another block of the cluster.
__device__ __forceinline__ uint32_t remote_address(const void* pointer, uint32_t block) {
    uint32_t address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(address)
        : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(pointer))), "r"(block));
    return address;
}

// Adds the counts of this block to the totals that every block of the cluster keeps, and clears them.
__device__ __forceinline__ void add_to_totals(ClusterMemory& memory, int digit_number, uint32_t block, uint32_t num_blocks) {
    for (int bin = threadIdx.x; bin < BINS; bin += THREADS) {
        const uint32_t count = memory.histogram[bin];
        if (count == 0) continue;
        memory.histogram[bin] = 0;
        for (uint32_t step = 0; step < num_blocks; ++step) {
            // Every block begins with itself, so that they do not all go to the same one.
            const uint32_t other = block + step < num_blocks ? block + step : block + step - num_blocks;
            const uint32_t address = remote_address(&memory.totals[digit_number][bin], other);
            asm volatile("red.relaxed.cluster.shared::cluster.add.u32 [%0], %1;" ::"r"(address), "r"(count) : "memory");
        }
    }
}

// Low half: scores that are chosen whatever their position; high half: scores equal to the k-th where not all fit.
__device__ __forceinline__ uint32_t count_chosen(uint4 scores, uint32_t chosen_from, bool has_ties, uint32_t tied) {
    uint32_t num_chosen = (scores.x >= chosen_from) + (scores.y >= chosen_from) + (scores.z >= chosen_from) +
                          (scores.w >= chosen_from);
    if (has_ties) {
        num_chosen += 0x10000u * ((scores.x == tied) + (scores.y == tied) + (scores.z == tied) + (scores.w == tied));
    }
    return num_chosen;
}

__global__ void __launch_bounds__(THREADS, 2) select_clusters(const Rows rows) {
    ClusterMemory& memory = *reinterpret_cast<ClusterMemory*>(dynamic_memory);
    uint4* slice = reinterpret_cast<uint4*>(reinterpret_cast<char*>(dynamic_memory) + sizeof(ClusterMemory));
    cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
    const uint32_t block = cluster.block_rank(), num_blocks = cluster.num_blocks();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const Row row = open_row(rows, blockIdx.y);
    int* out = rows.indices + blockIdx.y * rows.indices_stride;
    const int k = rows.k;
    if (row.length <= k) {
        for (int i = block * THREADS + threadIdx.x; i < k; i += num_blocks * THREADS) out[i] = i < row.length ? i : -1;
        return;
    }
    // The histogram and the totals lie one after the other.
    for (int i = threadIdx.x; i < (1 + NUM_DIGITS) * BINS / VECTOR; i += THREADS) {
        reinterpret_cast<uint4*>(memory.histogram)[i] = make_uint4(0, 0, 0, 0);
    }
    __syncthreads();
    auto has_cleared = cluster.barrier_arrive();

    // Every block takes the same number of vectors, in the order of the row; what lies outside of the row counts as zero
    // bits, which are smaller than those of any score.
    const int num_vectors = (row.length + row.skew + VECTOR - 1) / VECTOR;
    const int slice_vectors = (num_vectors + num_blocks - 1) / num_blocks;
    const int begin = min(static_cast<int>(block) * slice_vectors, num_vectors);
    const int num_own = min(slice_vectors, num_vectors - begin);
    for (int start = threadIdx.x; start < num_own; start += SLICE_UNROLL * THREADS) {
        float4 vectors[SLICE_UNROLL];
#pragma unroll
        for (int n = 0; n < SLICE_UNROLL; ++n) {
            const int vector = begin + start + n * THREADS;
            if (start + n * THREADS < num_own) {
                vectors[n] = row.is_inside(vector, vector + 1) ? row.load(vector) : row.load_edge(vector);
            }
        }
#pragma unroll
        for (int n = 0; n < SLICE_UNROLL; ++n) {
            const int vector = start + n * THREADS;
            if (vector >= num_own) break;
            const int column = (begin + vector) * VECTOR - row.skew;
            const float values[VECTOR] = {vectors[n].x, vectors[n].y, vectors[n].z, vectors[n].w};
            uint32_t ordered[VECTOR];
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                // No score of the row counts as less than -inf, not even NaN.
                const bool is_valid = column + j >= 0 && column + j < row.length;
                ordered[j] = is_valid ? max(to_ordered(values[j]), ORDERED_MINUS_INFINITY) : 0u;
                atomicAdd(&memory.histogram[ordered[j] >> (32 - DIGIT_BITS)], 1u);
            }
            slice[vector] = make_uint4(ordered[0], ordered[1], ordered[2], ordered[3]);
        }
    }
    __syncthreads();
    cluster.barrier_wait(std::move(has_cleared));

    // The k-th largest, one digit after the other.
    uint32_t prefix = 0, rank = k;
    int low = 32;
    Found last;
    for (int number = 0;; ++number) {
        const int width = low < DIGIT_BITS ? low : DIGIT_BITS;
        low -= width;
        if (number > 0) {
            const uint32_t mask = (1u << width) - 1;
            for (int vector = threadIdx.x; vector < num_own; vector += THREADS) {
                const uint4 scores = slice[vector];
                const uint32_t ordered[VECTOR] = {scores.x, scores.y, scores.z, scores.w};
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) {
                    if ((ordered[j] >> (low + width)) == prefix) atomicAdd(&memory.histogram[(ordered[j] >> low) & mask], 1u);
                }
            }
            __syncthreads();
        }
        add_to_totals(memory, number, block, num_blocks);
        cluster.sync();
        last = find_digit(memory.totals[number], memory.warp_sums, &memory.found, rank);
        rank = last.rank;
        prefix = (prefix << width) | last.digit;
        if (low == 0 || last.count == last.rank) break;
    }
    const uint32_t kth = prefix << low;
    const bool has_ties = last.count > last.rank;
    const uint32_t chosen_from = has_ties ? kth + 1 : kth;

    // Every warp counts what it will write, then writes in the order of the row.
    const int warp_vectors = (slice_vectors + THREADS - 1) / THREADS * 32;
    const int warp_begin = min(warp * warp_vectors, num_own), warp_end = min(warp_begin + warp_vectors, num_own);
    uint32_t num_chosen = 0;
    for (int vector = warp_begin + lane; vector < warp_end; vector += 32) {
        num_chosen += count_chosen(slice[vector], chosen_from, has_ties, kth);
    }
    const uint32_t warp_chosen = __reduce_add_sync(~0u, num_chosen);
    if (lane == 0) memory.warp_sums[warp] = warp_chosen;
    __syncthreads();
    const uint32_t before_warp = __reduce_add_sync(~0u, lane < warp ? memory.warp_sums[lane] : 0u);
    const uint32_t block_chosen = __reduce_add_sync(~0u, lane < WARPS ? memory.warp_sums[lane] : 0u);
    if (threadIdx.x < num_blocks) {
        const uint32_t address = remote_address(&memory.block_counts[block], threadIdx.x);
        asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(block_chosen) : "memory");
    }
    // The last access to another block's memory lies before this, so that blocks may leave after it.
    cluster.sync();
    const uint32_t others = lane < static_cast<int>(block) ? memory.block_counts[lane] : 0u;
    uint32_t num_above = __reduce_add_sync(~0u, others & 0xFFFFu) + (before_warp & 0xFFFFu);
    uint32_t num_tied = __reduce_add_sync(~0u, others >> 16) + (before_warp >> 16);
    for (int start = warp_begin; start < warp_end; start += 32) {
        const int vector = start + lane;
        const uint4 scores = vector < warp_end ? slice[vector] : make_uint4(0, 0, 0, 0);
        const uint32_t own = count_chosen(scores, chosen_from, has_ties, kth);
        if (!__any_sync(~0u, own)) continue;
        const uint32_t inclusive = warp_inclusive_sum(own);
        uint32_t above = num_above + ((inclusive - own) & 0xFFFFu), tied = num_tied + ((inclusive - own) >> 16);
        const int column = (begin + vector) * VECTOR - row.skew;
        const uint32_t ordered[VECTOR] = {scores.x, scores.y, scores.z, scores.w};
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) {
            const bool is_tied = has_ties && ordered[j] == kth;
            if (ordered[j] >= chosen_from || (is_tied && tied < rank)) {
                const uint32_t slot = above + min(tied, rank);
                if (slot < static_cast<uint32_t>(k)) out[slot] = column + j;
            }
            above += ordered[j] >= chosen_from;
            tied += is_tied;
        }
        const uint32_t sum = __shfl_sync(~0u, inclusive, 31);
        num_above += sum & 0xFFFFu;
        num_tied += sum >> 16;
    }
}

template <typename Kernel>
cudaError_t allow_shared_memory(Kernel kernel, int bytes) {
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status != cudaSuccess) return status;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
}

}  // namespace

// Both launchers: scores are num_rows rows of num_columns floats, row_stride floats apart; num_valid is int64 or int32;
// indices are num_rows rows of k, indices_stride apart; k is at most 4096. They return a cudaError_t.

extern "C" int openkeye_top_k_rows(const float* scores, const void* num_valid, int is_valid_long, int* indices, int num_rows,
                                   int num_columns, int64_t row_stride, int64_t indices_stride, int k, cudaStream_t stream) {
    if (k < 1 || k > MAX_K || num_columns > MAX_COLUMNS) return cudaErrorInvalidValue;
    const int bytes = sizeof(RowMemory);
    const cudaError_t status = allow_shared_memory(select_rows, bytes);
    if (status != cudaSuccess) return status;
    const Rows rows{scores, num_valid, indices, row_stride, indices_stride, num_columns, k, is_valid_long};
    select_rows<<<num_rows, THREADS, bytes, stream>>>(rows);
    return cudaGetLastError();
}

// The columns that a cluster of so many blocks can hold.
extern "C" int openkeye_top_k_cluster_columns(int cluster_size) {
    const int num_vectors = (227 * 1024 - static_cast<int>(sizeof(ClusterMemory))) / static_cast<int>(sizeof(uint4));
    // Rows that do not begin at a vector take part of one more.
    return (cluster_size * num_vectors - 1) * VECTOR;
}

extern "C" int openkeye_top_k_clusters(const float* scores, const void* num_valid, int is_valid_long, int* indices,
                                       int num_rows, int num_columns, int64_t row_stride, int64_t indices_stride, int k,
                                       int cluster_size, cudaStream_t stream) {
    const bool is_served = cluster_size >= 1 && cluster_size <= MAX_CLUSTER && k >= 1 && k <= MAX_K &&
                           num_columns <= openkeye_top_k_cluster_columns(cluster_size);
    if (!is_served) return cudaErrorInvalidValue;
    const int num_vectors = (num_columns + 2 * VECTOR - 2) / VECTOR;
    const int bytes = sizeof(ClusterMemory) + (num_vectors + cluster_size - 1) / cluster_size * sizeof(uint4);
    cudaError_t status = allow_shared_memory(select_clusters, bytes);
    if (status != cudaSuccess) return status;
    if (cluster_size > 8) {
        status = cudaFuncSetAttribute(select_clusters, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
        if (status != cudaSuccess) return status;
    }
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster_size;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(cluster_size, num_rows);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    const Rows rows{scores, num_valid, indices, row_stride, indices_stride, num_columns, k, is_valid_long};
    return cudaLaunchKernelEx(&config, select_clusters, rows);
}
