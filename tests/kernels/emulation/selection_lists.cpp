// Runs `selection_lists.cuh` on a CPU over random lists and compares with a sort. Prints every case; fails where one is wrong.

#include "blocks.h"

namespace {
inline void group_barrier(int group) { group_barriers[group]->arrive_and_wait(); }
}  // namespace

#include "../../../openkeye/kernels/selection_lists.cuh"

#include <stdio.h>

#include <random>
#include <set>

using Entry = std::pair<float, int>;  // score, position

static bool is_better(const Entry& a, const Entry& b) { return a.first != b.first ? a.first > b.first : a.second < b.second; }

static const char* const kKinds[] = {"normal", "equal", "huge", "coarse", "tiny and negative"};

static float draw_score(int kind, std::mt19937& random) {
  std::normal_distribution<float> normal;
  switch (kind) {
    case 0: return 2 + std::fabs(normal(random));
    case 1: return 0;
    case 2: return normal(random) * 1e30f;
    case 3: return (float)(random() % 5);
    default: return -std::fabs(normal(random)) * 1e-30f;
  }
}

static std::vector<Entry> draw_entries(int kind, int num, int num_keys, std::mt19937& random) {
  std::set<int> positions{0, num_keys - 1};
  while ((int)positions.size() < num) positions.insert((int)(random() % num_keys));
  std::vector<Entry> entries;
  for (int position : positions) entries.push_back({draw_score(kind, random), position});
  std::shuffle(entries.begin(), entries.end(), random);
  return entries;
}

struct HostList {
  std::vector<uint8_t> bytes = std::vector<uint8_t>(kListBytes, 0xcd), counts = std::vector<uint8_t>(kStrands, 0);

  void append(int strand, const Entry& entry) {
    const int2 raw = make_int2(entry.second, __float_as_int(entry.first));
    memcpy(&bytes[(strand / kOwners * kSlots + counts[strand]++) * kSlotBytes + strand % kOwners * 8], &raw, 8);
  }

  std::vector<Entry> read() const {
    std::vector<Entry> entries;
    for (int strand = 0; strand < kStrands; ++strand) {
      for (int slot = 0; slot < counts[strand]; ++slot) {
        int2 raw;
        memcpy(&raw, &bytes[(strand / kOwners * kSlots + slot) * kSlotBytes + strand % kOwners * 8], 8);
        entries.push_back({__int_as_float(raw.y), raw.x});
      }
    }
    return entries;
  }
};

// Over few strands each of which fills up, or over all of them at random.
static HostList spread(const std::vector<Entry>& entries, bool is_lopsided, std::mt19937& random) {
  HostList list;
  int first = 0;
  for (const Entry& entry : entries) {
    int strand = (int)(random() % kStrands);
    if (is_lopsided) {
      if (list.counts[first] == kSlots) ++first;
      strand = first;
    }
    while (list.counts[strand] == kSlots) strand = (strand + 1) % kStrands;
    list.append(strand, entry);
  }
  return list;
}

static int check_write(const HostList& list, const std::vector<Entry>& sorted, int num_keys, int k) {
  static SelectorMemory memory;
  memset(&memory, 0xab, sizeof memory);
  memset(memory.scratch.bins, 0, sizeof memory.scratch.bins);
  memset(memory.bitmap, 0, sizeof memory.bitmap);
  std::vector<int> out(k, -7), expected;
  run_block(kGroupThreads, [&] {
    const List seen = view_list(list.bytes.data(), list.counts.data());
    write_row(Entries<kSlots>(seen, threadIdx.x), memory, threadIdx.x, 0, num_keys, k, out.data());
  });
  for (int i = 0; i < k; ++i) expected.push_back(sorted[i].second);
  std::sort(expected.begin(), expected.end());
  return out != expected;
}

static int check_prune(HostList list, const std::vector<Entry>& sorted, int k) {
  static GroupScratch scratch;
  memset(&scratch, 0xab, sizeof scratch);
  memset(scratch.bins, 0, sizeof scratch.bins);
  float threshold = -INFINITY;
  run_block(kGroupThreads, [&] { prune(list.bytes.data(), list.counts.data(), &threshold, scratch, 0, threadIdx.x, k); });
  std::vector<Entry> kept = list.read();
  std::sort(kept.begin(), kept.end(), is_better);
  const int least = std::min(k, (int)sorted.size());
  const int longest = *std::max_element(list.counts.begin(), list.counts.end());
  const int shortest = *std::min_element(list.counts.begin(), list.counts.end());
  int wrong = (int)kept.size() < least || (int)kept.size() > least + kTies || longest - shortest > 1;
  for (int i = 0; i < least && !wrong; ++i) wrong = kept[i] != sorted[i];
  // Keys to come may only replace what they beat: scores from the threshold on are above those of k entries.
  const int above = (int)std::count_if(sorted.begin(), sorted.end(), [&](const Entry& entry) { return entry.first >= threshold; });
  return wrong || ((int)sorted.size() > k && above > k + kTies);
}

int main() {
  std::mt19937 random(1);
  int num_wrong = 0;
  for (int kind = 0; kind < 5; ++kind) {
    for (int k : {1, 37, 2048, kMaxK}) {
      for (int num : {k + 1, 3400, 5200}) {
        if (num <= k) continue;
        const int num_keys = kind % 2 ? 300000 : 131072;
        std::vector<Entry> sorted = draw_entries(kind, num, num_keys, random);
        const HostList list = spread(sorted, num == 3400, random);
        std::sort(sorted.begin(), sorted.end(), is_better);
        const int write = check_write(list, sorted, num_keys, k), pruned = check_prune(list, sorted, k);
        printf("%s, k %d of %d: %s\n", kKinds[kind], k, num, write ? "WRONG row" : pruned ? "WRONG list" : "ok");
        num_wrong += write + pruned;
      }
    }
  }
  return num_wrong != 0;
}
