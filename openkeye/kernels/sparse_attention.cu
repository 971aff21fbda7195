// Selected attention for prefill on sm_90a: a block serves 16 neighbouring queries times 8 heads of one KV head, 128 rows.
//
// The keys that the 16 queries selected between them (see unions.py) are fetched once. One warpgroup gathers rows of keys
// and values into a ring of shared memory; two warpgroups multiply, 64 rows (8 queries) each: the products with the next
// keys and with the last values are in flight while a warpgroup works on its softmax. Blocks stay and take one tile after
// the other, so that the gathering runs ahead over a tile's end.
//
// The order of a step's 128 keys is free. Their rows in shared memory are permuted so that the keys which one lane of a quad
// finds in its fragment are 32 consecutive entries of the union: whether a query selected them is one word for each query.
//
// Shared memory holds 64 columns (128 bytes) of each row in the 128-byte swizzle that wgmma reads: byte 16 c of row r stands
// at 16 (c ^ (r % 8)). Keys are a K-major operand, values an MN-major one: both lie as they come from memory.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace {

constexpr int kTile = 16;                      // queries of a block
constexpr int kHeads = 8;                      // heads of a block
constexpr int kBlock = 128;                    // keys of a step
constexpr int kStages = 3;                     // of the ring, for keys and for values
constexpr int kConsumers = 2;                  // warpgroups that multiply
constexpr int kGroupThreads = 128;
constexpr int kGroupRows = kTile * kHeads / kConsumers;
constexpr int kThreads = kGroupThreads * (1 + kConsumers);
constexpr int kRowBytes = 128;                 // of one swizzled row: 64 numbers
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;
constexpr float kLazy = 8.0f;                  // a row's top moves once the scores exceed it by a factor of 2^8
constexpr int kMaxPolls = 1 << 24;             // of a barrier: so that an error ends in a trap and not in a hang
constexpr uint32_t kAll = 0xffffffffu;
constexpr float kLn2 = 0.6931471805599453f;

// Named barriers; 0 is __syncthreads.
constexpr int kGroupBarrier = 1;               // and the next: one for each multiplying warpgroup
constexpr int kTurnBarrier = 3;                // and the next: whose turn it is to start products

struct Arguments {
  const uint8_t* query;                        // [T, H, D], contiguous
  const uint8_t* key;                          // [S, G, D], strides below
  const uint8_t* value;
  const int* union_keys;                       // [N, room]
  const int* union_masks;
  const int* union_counts;                     // [N]
  const int* page_table;                       // [B, pages], or null: positions are slots
  const int* sequences;                        // [N] row of the page table, or null for 0
  uint8_t* output;                             // [T, H, D]
  float* lse;                                  // [T, H]
  long long key_group, value_group;            // bytes
  int key_row, value_row;                      // bytes
  int num_queries, num_tiles, num_heads, group, num_blocks, num_work, room;
  int most;                                    // tiles of larger unions are left to another kernel
  int table_row, page_shift;
  float scale_log2;
};

template <int kWidth>
struct alignas(1024) Shared {
  uint8_t query[kConsumers][kGroupRows * kWidth * 2];   // later the outputs
  uint8_t key[kStages][kBlock * kWidth * 2];
  uint8_t value[kStages][kBlock * kWidth * 2];
  uint32_t chosen[kStages][kTile][4];                   // bit i of word w: did the query select key 32 w + i of the step
  uint64_t key_full[kStages], key_free[kStages], value_full[kStages], value_free[kStages];
};

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ void init_barrier(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives once all earlier copies of this thread have landed.
__device__ __forceinline__ void arrive_after_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void wait_for(uint64_t* barrier, int parity) {
  const uint32_t address = shared_address(barrier);
#pragma unroll 1
  for (int poll = 0; poll < kMaxPolls; ++poll) {
    uint32_t is_done;
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(is_done)
        : "r"(address), "r"(parity)
        : "memory");
    if (is_done) return;
  }
  __trap();
}

__device__ __forceinline__ void sync_threads(int name, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(count) : "memory");
}

__device__ __forceinline__ void announce(int name, int count) {
  asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(count) : "memory");
}

// What ordinary stores and cp.async wrote, the tensor cores may read from here on.
__device__ __forceinline__ void fence_for_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void copy_16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <bool kIsHalf>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t both;
  if constexpr (kIsHalf) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  }
  return both;
}

// ---- wgmma ----

constexpr uint64_t kSwizzle128 = 1ull << 62;

// leading is read for MN-major operands only: the step from 64 columns to the next 64; stride: from 8 rows to the next 8.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, int leading, int stride) {
  return kSwizzle128 | (static_cast<uint64_t>(stride >> 4) << 32) | (static_cast<uint64_t>(leading >> 4) << 16) |
         ((address & 0x3ffff) >> 4);
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kInFlight>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kInFlight) : "memory");
}

// Keeps the compiler from moving uses of registers across the wait for the products that fill or read them.
template <int kCount>
__device__ __forceinline__ void pin(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

template <int kCount>
__device__ __forceinline__ void pin(uint32_t (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

#define REGISTERS_32                                                                          \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                    \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_64                                                                          \
  REGISTERS_32                                                                                \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "        \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FOUR(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SIXTEEN(d, i) FOUR(d, i), FOUR(d, i + 4), FOUR(d, i + 8), FOUR(d, i + 12)
#define THIRTY_TWO(d) SIXTEEN(d, 0), SIXTEEN(d, 16)
#define SIXTY_FOUR(d) THIRTY_TWO(d), SIXTEEN(d, 32), SIXTEEN(d, 48)

// Scores of 64 rows and 128 keys, over 16 columns; both operands in shared memory, K-major.
#define SCORE_PRODUCT(TYPE)                                                                               \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE \
               " {" REGISTERS_64 "}, %64, %65, p, 1, 1, 0, 0; }"                                          \
               : SIXTY_FOUR(d)                                                                            \
               : "l"(a), "l"(b), "r"(adds))

template <bool kIsHalf>
__device__ __forceinline__ void multiply_keys(float (&d)[64], uint64_t a, uint64_t b, int adds) {
  if constexpr (kIsHalf) {
    SCORE_PRODUCT("f16.f16");
  } else {
    SCORE_PRODUCT("bf16.bf16");
  }
}

// Adds the values of 16 keys, weighed: weights from registers, values in shared memory, MN-major.
#define VALUE_PRODUCT(SHAPE, TYPE, REGISTERS, OUTPUTS, A0, A1, A2, A3, B)                                         \
  asm volatile("wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE " {" REGISTERS "}, {" A0 ", " A1 ", " A2 ", " A3 \
               "}, " B ", 1, 1, 1, 1;"                                                                            \
               : OUTPUTS                                                                                          \
               : "r"(a[4 * k]), "r"(a[4 * k + 1]), "r"(a[4 * k + 2]), "r"(a[4 * k + 3]), "l"(b))
#define VALUE_PRODUCT_128(TYPE) \
  VALUE_PRODUCT("m64n128k16", TYPE, REGISTERS_64, SIXTY_FOUR(d), "%64", "%65", "%66", "%67", "%68")
#define VALUE_PRODUCT_64(TYPE) VALUE_PRODUCT("m64n64k16", TYPE, REGISTERS_32, THIRTY_TWO(d), "%32", "%33", "%34", "%35", "%36")

template <bool kIsHalf>
__device__ __forceinline__ void multiply_values(float (&d)[64], const uint32_t (&a)[32], int k, uint64_t b) {
  if constexpr (kIsHalf) {
    VALUE_PRODUCT_128("f16.f16");
  } else {
    VALUE_PRODUCT_128("bf16.bf16");
  }
}

template <bool kIsHalf>
__device__ __forceinline__ void multiply_values(float (&d)[32], const uint32_t (&a)[32], int k, uint64_t b) {
  if constexpr (kIsHalf) {
    VALUE_PRODUCT_64("f16.f16");
  } else {
    VALUE_PRODUCT_64("bf16.bf16");
  }
}

// ---- the ring ----

// A place in the ring and the parity of the round that it is in.
struct Place {
  int stage = 0, round = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      round ^= 1;
    }
  }
};

// ---- gathering ----

// Gathers the keys and values of all tiles of this block. Warp w fetches keys 32 w .. 32 w + 31 of each step; key i of them
// goes to row 8 (i / 2) + 2 w + i % 2, where the lanes 4 n + w of the multiplying warps have it in words 2 (i / 2) + i % 2.
template <int kWidth>
__device__ __forceinline__ void gather(const Arguments& in, Shared<kWidth>& shared) {
  constexpr int kChunks = kWidth / 8;          // of 16 bytes in a row
  constexpr int kAtOnce = 32 / kChunks;        // rows of one warp instruction
  constexpr int kPasses = 32 / kAtOnce;
  constexpr int kPassBytes = kAtOnce / 2 * 8 * kRowBytes;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int chunk = lane % kChunks, part = lane / kChunks;
  const int row = part / 2 * 8 + warp * 2 + part % 2;
  const uint32_t offset = chunk / 8 * kBlock * kRowBytes + row * kRowBytes + ((chunk % 8 ^ row % 8) << 4);
  auto copy_rows = [&](uint32_t to, const uint8_t* from, uint32_t row_bytes, uint32_t slot) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const uint32_t its_slot = __shfl_sync(kAll, slot, pass * kAtOnce + part);
      copy_16(to + pass * kPassBytes, from + static_cast<uint64_t>(its_slot) * row_bytes);
    }
  };
  Place place;
  for (int work = blockIdx.x; work < in.num_work; work += gridDim.x) {
    const int tile = work % in.num_tiles, block = work / in.num_tiles;
    const int count = in.union_counts[tile];
    if (count > in.most) continue;
    const int* keys = in.union_keys + static_cast<long long>(tile) * in.room;
    const int* masks = in.union_masks + static_cast<long long>(tile) * in.room;
    const int* pages = nullptr;
    if (in.page_table) {
      const long long sequence = in.sequences ? in.sequences[tile] : 0;
      pages = in.page_table + sequence * in.table_row;
    }
    const int group = block / in.num_blocks;
    const uint8_t* key = in.key + group * in.key_group + chunk * 16;
    const uint8_t* value = in.value + group * in.value_group + chunk * 16;
    // Each as one number, so that a row's address is one multiplication and addition.
    asm volatile("" : "+l"(key), "+l"(value));
    // Past the union's end stands its last key again, selected by nobody: memory that no list names is never read.
    auto slot_of = [&](int position) {
      return pages ? (pages[position >> in.page_shift] << in.page_shift) + (position & ((1 << in.page_shift) - 1)) : position;
    };
    int column = warp * 32 + lane;
    int mask = 0, slot = 0;
    if (count > 0) {
      slot = slot_of(keys[min(column, count - 1)]);
      mask = column < count ? masks[column] : 0;
    }
    for (int start = 0; start < count; start += kBlock) {
      column += kBlock;
      const int next_position = start + kBlock < count ? keys[min(column, count - 1)] : 0;
      const int next_mask = column < count ? masks[column] : 0;

      wait_for(&shared.key_free[place.stage], place.round ^ 1);
      copy_rows(shared_address(shared.key[place.stage]) + offset, key, in.key_row, slot);
      arrive_after_copies(&shared.key_full[place.stage]);
      uint32_t word = 0;
#pragma unroll
      for (int query = 0; query < kTile; ++query) {
        const uint32_t its_word = __ballot_sync(kAll, mask >> query & 1);
        if (lane == query) word = its_word;
      }
      if (lane < kTile) shared.chosen[place.stage][lane][warp] = word;
      __syncwarp();
      if (lane == 0) arrive(&shared.key_full[place.stage]);

      wait_for(&shared.value_free[place.stage], place.round ^ 1);
      copy_rows(shared_address(shared.value[place.stage]) + offset, value, in.value_row, slot);
      arrive_after_copies(&shared.value_full[place.stage]);
      place.advance();
      mask = next_mask;
      slot = start + kBlock < count ? slot_of(next_position) : 0;
    }
  }
}

// ---- multiplying ----

// Softmax of one row's keys so far: the scores' top in use (raw, at most 2^kLazy below the true one) and this lane's part of
// the sum. A thread has two rows: [0] of the warp's first query, [1] of its second.
struct Softmax {
  float top[2], sum[2], shrink[2];

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int half = 0; half < 2; ++half) top[half] = -INFINITY, sum[half] = 0.0f, shrink[half] = 1.0f;
  }

  // Scores to weights; true where the tops moved, and with them what earlier weights are worth (shrink).
  __device__ __forceinline__ bool fold(float (&s)[64], const uint32_t (&chosen)[2], float scale_log2) {
    float high[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      // Words 4 n + 0, 1 are columns 8 n + 2 (lane % 4) + 0, 1 of the first row, words 4 n + 2, 3 of the second.
      const int half = i / 2 % 2, bit = i / 4 * 2 + i % 2;
      s[i] = chosen[half] & (1u << bit) ? s[i] : -INFINITY;
      high[half] = fmaxf(high[half], s[i]);
    }
    bool is_above = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      high[half] = fmaxf(high[half], __shfl_xor_sync(kAll, high[half], 1));
      high[half] = fmaxf(high[half], __shfl_xor_sync(kAll, high[half], 2));
      is_above |= (high[half] - top[half]) * scale_log2 > kLazy;
    }
    const bool moves = __any_sync(kAll, is_above);
    if (moves) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float next = fmaxf(top[half], high[half]);
        shrink[half] = next == -INFINITY ? 1.0f : exp2_approx((top[half] - next) * scale_log2);
        sum[half] *= shrink[half];
        top[half] = next;
      }
    }
    float shift[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) shift[half] = top[half] == -INFINITY ? 0.0f : top[half] * scale_log2;
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      const int half = i / 2 % 2;
      s[i] = exp2_approx(fmaf(s[i], scale_log2, -shift[half]));
      sum[half] += s[i];
    }
    return moves;
  }
};

// The rows of one warpgroup in queries and outputs: row 8 q + h is head h of its query q.
struct Rows {
  int num_tokens, num_heads, stride;           // of them there are; heads of a token in memory
  long long first;

  __device__ __forceinline__ Rows(const Arguments& in, int work, int consumer) {
    const int tile = work % in.num_tiles, block = work / in.num_tiles;
    const int token = tile * kTile + consumer * (kTile / kConsumers);
    const int group = block / in.num_blocks, head = block % in.num_blocks * kHeads;
    num_tokens = in.num_queries - token;
    num_heads = in.group - head;
    stride = in.num_heads;
    first = static_cast<long long>(token) * in.num_heads + group * in.group + head;
  }
  __device__ __forceinline__ bool has(int row) const { return row / kHeads < num_tokens && row % kHeads < num_heads; }
  __device__ __forceinline__ long long place(int row) const { return first + row / kHeads * stride + row % kHeads; }
};

// Multiplies one warpgroup's 64 rows. The two warpgroups start their products one after the other, so that one's softmax falls
// into the other's products.
template <int kWidth, bool kIsHalf>
__device__ __forceinline__ void attend(const Arguments& in, Shared<kWidth>& shared, int consumer) {
  constexpr int kChunks = kWidth / 8;
  constexpr int kAtOnce = 32 / kChunks;
  constexpr int kPasses = 16 / kAtOnce;        // over the 16 rows that a warp loads and stores
  constexpr int kHalfBytes = kGroupRows * kRowBytes;
  const int warp = threadIdx.x % kGroupThreads / 32, lane = threadIdx.x % 32;
  const int chunk = lane % kChunks;
  uint8_t* const own = shared.query[consumer];
  const uint64_t query_descriptor = descriptor(shared_address(own), 0, 8 * kRowBytes);

  auto swizzled = [&](int row, int its_chunk) {
    return own + its_chunk / 8 * kHalfBytes + row * kRowBytes + ((its_chunk % 8 ^ row % 8) << 4);
  };
  auto own_row = [&](int pass) { return warp * 16 + pass * kAtOnce + lane / kChunks; };
  uint4 fetched[kPasses];
  auto fetch_query = [&](int work) {
    const Rows rows(in, work, consumer);
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const bool is_there = work < in.num_work && rows.has(own_row(pass));
      const uint8_t* from = in.query + rows.place(own_row(pass)) * (kWidth * 2) + chunk * 16;
      fetched[pass] = is_there ? *reinterpret_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
    }
  };

  float output[kWidth / 2], scores[64];
  uint32_t weights[32] = {};
  Softmax softmax;
  Place key_place, value_place, left_place;    // of values: the next to multiply, the next to give back

  auto start_scores = [&]() {
    const uint64_t b = descriptor(shared_address(shared.key[key_place.stage]), 0, 8 * kRowBytes);
#pragma unroll
    for (int k = 0; k < kWidth / 16; ++k) {
      // 16 columns are 32 bytes of a row; after 64 of them comes the next half.
      const int half = k / 4, step = k % 4 * 2;
      multiply_keys<kIsHalf>(
          scores, query_descriptor + half * (kHalfBytes >> 4) + step, b + half * (kBlock * kRowBytes >> 4) + step, k > 0);
    }
    commit_products();
  };
  auto start_values = [&]() {
    const uint64_t b = descriptor(shared_address(shared.value[value_place.stage]), kBlock * kRowBytes, 8 * kRowBytes);
#pragma unroll
    for (int k = 0; k < kBlock / 16; ++k) multiply_values<kIsHalf>(output, weights, k, b + k * (16 * kRowBytes >> 4));
    commit_products();
    value_place.advance();
  };
  uint32_t chosen[2];
  auto wait_for_keys = [&]() {
    wait_for(&shared.key_full[key_place.stage], key_place.round);
    const int query = consumer * (kTile / kConsumers) + warp * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) chosen[half] = shared.chosen[key_place.stage][query + half][lane % 4];
  };
  auto wait_for_values = [&]() { wait_for(&shared.value_full[value_place.stage], value_place.round); };
  auto leave = [&](uint64_t* barrier, Place& place) {
    __syncwarp();
    if (lane == 0) arrive(barrier + place.stage);
    place.advance();
  };
  // Once the last products are done: their values are given back, and the new weights take the place of theirs.
  auto weigh = [&](bool moves, bool has_products) {
    wait_for_products<0>();
    pin(output);
    pin(weights);
    if (has_products) leave(shared.value_free, left_place);
    if (moves) {
#pragma unroll
      for (int i = 0; i < kWidth / 2; ++i) output[i] *= softmax.shrink[i / 2 % 2];
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) weights[i] = pack<kIsHalf>(scores[2 * i], scores[2 * i + 1]);
  };

  if (consumer == 1) announce(kTurnBarrier, 2 * kGroupThreads);
  fetch_query(blockIdx.x);
  for (int work = blockIdx.x; work < in.num_work; work += gridDim.x) {
    const int count = in.union_counts[work % in.num_tiles];
    if (count > in.most) {
      fetch_query(work + gridDim.x);
      continue;
    }
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) *reinterpret_cast<uint4*>(swizzled(own_row(pass), chunk)) = fetched[pass];
    fence_for_products();
    sync_threads(kGroupBarrier + consumer, kGroupThreads);
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) output[i] = 0.0f;
    softmax.reset();

    if (count > 0) {
      wait_for_keys();
      fence_for_products();
      begin_products();
      start_scores();
      wait_for_products<0>();
      pin(scores);
      leave(shared.key_free, key_place);
      bool moves = softmax.fold(scores, chosen, in.scale_log2);
      pin(scores);
      for (int start = kBlock; start < count; start += kBlock) {
        // The values of the step before were fetched before these keys: waiting for both costs nothing. It stands between the
        // softmax and the end of the last products, lest the assembler wait for those first and compute afterwards.
        wait_for_keys();
        wait_for_values();
        weigh(moves, start > kBlock);
        fence_for_products();
        sync_threads(kTurnBarrier + consumer, 2 * kGroupThreads);
        begin_products();
        start_scores();
        start_values();
        announce(kTurnBarrier + (consumer ^ 1), 2 * kGroupThreads);
        wait_for_products<1>();
        pin(scores);
        leave(shared.key_free, key_place);
        moves = softmax.fold(scores, chosen, in.scale_log2);
        pin(scores);
      }
      wait_for_values();
      weigh(moves, count > kBlock);
      fence_for_products();
      begin_products();
      start_values();
      fetch_query(work + gridDim.x);
      wait_for_products<0>();
      pin(output);
      pin(weights);
      leave(shared.value_free, left_place);
    } else {
      fetch_query(work + gridDim.x);
    }

    const Rows rows(in, work, consumer);
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = softmax.sum[half];
      sum += __shfl_xor_sync(kAll, sum, 1);
      sum += __shfl_xor_sync(kAll, sum, 2);
      inverse[half] = sum > 0.0f ? 1.0f / sum : 0.0f;
      // A sum that is no number stays one, in the logarithm and in the outputs.
      if (sum != sum) inverse[half] = sum;
      const int row = warp * 16 + half * 8 + lane / 4;
      if (lane % 4 == 0 && rows.has(row)) {
        in.lse[rows.place(row)] = sum == 0.0f ? -INFINITY : (softmax.top[half] * in.scale_log2 + log2f(sum)) * kLn2;
      }
    }
    // The queries are read no more once all four warps have come here; their place takes the outputs on the way to memory.
    sync_threads(kGroupBarrier + consumer, kGroupThreads);
#pragma unroll
    for (int i = 0; i < kWidth / 2; i += 2) {
      const int row = warp * 16 + i / 2 % 2 * 8 + lane / 4;
      const float factor = inverse[i / 2 % 2];
      reinterpret_cast<uint32_t*>(swizzled(row, i / 4))[lane % 4] = pack<kIsHalf>(output[i] * factor, output[i + 1] * factor);
    }
    __syncwarp();
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = own_row(pass);
      uint8_t* to = in.output + rows.place(row) * (kWidth * 2) + chunk * 16;
      if (rows.has(row)) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<uint4*>(swizzled(row, chunk));
    }
    __syncwarp();
  }
}

template <int kWidth, bool kIsHalf>
__global__ void __launch_bounds__(kThreads, 1) sparse_attention_kernel(const __grid_constant__ Arguments in) {
  extern __shared__ uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared<kWidth>*>((reinterpret_cast<uintptr_t>(memory) + 1023) & ~uintptr_t{1023});
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      // All gathering threads through their copies, and one of each of their warps for the words of `chosen`.
      init_barrier(&shared.key_full[stage], kGroupThreads + kGroupThreads / 32);
      init_barrier(&shared.value_full[stage], kGroupThreads);
      init_barrier(&shared.key_free[stage], kConsumers * kGroupThreads / 32);
      init_barrier(&shared.value_free[stage], kConsumers * kGroupThreads / 32);
    }
  }
  __syncthreads();
  if (threadIdx.x < kGroupThreads) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducerRegisters));
    gather<kWidth>(in, shared);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters));
    attend<kWidth, kIsHalf>(in, shared, threadIdx.x / kGroupThreads - 1);
  }
}

template <int kWidth, bool kIsHalf>
cudaError_t launch(const Arguments& in, cudaStream_t stream) {
  const auto kernel = sparse_attention_kernel<kWidth, kIsHalf>;
  constexpr int kBytes = sizeof(Shared<kWidth>) + 1024;
  int device, num_processors;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&num_processors, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess) status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  kernel<<<in.num_work < num_processors ? in.num_work : num_processors, kThreads, kBytes, stream>>>(in);
  return cudaGetLastError();
}

}  // namespace

// Strides in bytes, each a multiple of 16, as all addresses are; scale_log2 above zero; see `Arguments` for the rest.
extern "C" int sparse_attention_forward(
    const void* query, const void* key, const void* value, const int* union_keys, const int* union_masks,
    const int* union_counts, const int* page_table, const int* sequences, void* output, float* lse, long long key_row,
    long long key_group, long long value_row, long long value_group, int num_queries, int num_heads, int num_groups, int width,
    int is_half, int room, int most, int table_row, int page_shift, float scale_log2, cudaStream_t stream) {
  Arguments in{};
  in.query = static_cast<const uint8_t*>(query);
  in.key = static_cast<const uint8_t*>(key);
  in.value = static_cast<const uint8_t*>(value);
  in.union_keys = union_keys, in.union_masks = union_masks, in.union_counts = union_counts;
  in.page_table = page_table, in.sequences = sequences;
  in.output = static_cast<uint8_t*>(output), in.lse = lse;
  in.key_group = key_group, in.value_group = value_group;
  in.key_row = static_cast<int>(key_row), in.value_row = static_cast<int>(value_row);
  in.num_queries = num_queries, in.num_heads = num_heads, in.group = num_heads / num_groups;
  in.num_tiles = (num_queries + kTile - 1) / kTile;
  in.num_blocks = (in.group + kHeads - 1) / kHeads;
  in.num_work = in.num_tiles * num_groups * in.num_blocks;
  in.room = room, in.most = most, in.table_row = table_row, in.page_shift = page_shift, in.scale_log2 = scale_log2;
  if (in.num_work == 0) return cudaSuccess;
  if (key_row > INT32_MAX || value_row > INT32_MAX) return cudaErrorInvalidValue;
  if (width == 128) return is_half ? launch<128, true>(in, stream) : launch<128, false>(in, stream);
  if (width == 64) return is_half ? launch<64, true>(in, stream) : launch<64, false>(in, stream);
  return cudaErrorInvalidValue;
}
