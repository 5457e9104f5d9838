// What multi_lora's kernel for at most 64 tokens is asked, and its tokens in the order of the plan.
#pragma once
#include "../common/tokens.cuh"

namespace lk {

struct MultiLoRASlice {
  const void *a, *b;                      // [rows, k] [rows, n], rank rows in pages of 8
  const int *table, *rank, *generation;   // [count, pages] [count] [count]
  const float* scale;                     // [count]
  const int* flags;                       // [count]: 1 there is a gain, 2 more, 4 times their row
  const float *gain, *more;               // [rows, n]
  int64_t n, first, pages, a_row, b_row;  // W's rows `first` to `first + n`
};

// k, n of the slices and the rows of all matrices are multiples of 8
struct MultiLoRASmall {
  const void *x, *w;           // [m, k] [rows, k]
  void* y;                     // [m, rows]
  const int64_t *ids, *order;  // [m] [m]
  int* error;                  // [1]
  float *h, *scratch;          // [parts of A, slices, m, ranks] [blocks of W, 64, tokens]
  int* tickets;                // [slices and tiles of W], zero before and after
  Vector bias;                 // [rows]
  int64_t m, k, count, slices, ranks, x_row, w_row, y_row;
  int64_t a_blocks, a_part, w_part;  // blocks of A for each slice; columns of a part of A, of W
  MultiLoRASlice slice[3];
};

constexpr int RANKS = 64, PAGE = 8, MAX_TOKENS = 64, MAX_SLICES = 3;  // RANKS of a step of B

__device__ inline MultiLoRASlice slice_of(const MultiLoRASmall& p, int g) {
  return g == 0 ? p.slice[0] : g == 1 ? p.slice[1] : p.slice[2];
}

// The tokens in the order of the plan, and whose they are.
struct Batch {
  int64_t entry[MAX_TOKENS];
  int slot[MAX_TOKENS];   // or -1
  int rank[MAX_TOKENS];   // of its adapter in a slice; 0 without one
  int until[MAX_TOKENS];  // the first position that is another adapter's
  int tiles[MAX_TOKENS];  // tiles of A up to here: an adapter's count at its first position
};

__device__ inline void read_entries(Batch& batch, const MultiLoRASmall& p) {
  for (int i = threadIdx.x; i < p.m; i += THREADS) batch.entry[i] = p.order[i];
  __syncthreads();
}

// the slots, and what a slice has of them. Returns how many tiles A has there.
__device__ int read_slots(Batch& batch, const MultiLoRASmall& p, const MultiLoRASlice& s) {
  __syncthreads();  // what was there has been read
  for (int i = threadIdx.x; i < MAX_TOKENS; i += THREADS) {
    int slot = -1;
    if (i < p.m) {
      const int64_t id = p.ids[batch.entry[i]], at = id & 0xffffffff;
      if (id >= 0 && at < p.count && s.generation[at] == int(id >> 32)) slot = int(at);
      if (slot < 0 && id != -1) atomicExch(p.error, 1);
    }
    batch.slot[i] = slot;
    batch.rank[i] = slot < 0 ? 0 : s.rank[slot];
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    int carried = 0;
    for (int half = 0; half < MAX_TOKENS; half += 32) {
      const int i = half + int(threadIdx.x), slot = batch.slot[i];
      const bool head = slot >= 0 && (i == 0 || batch.slot[i - 1] != slot);
      int tiles = head ? (batch.rank[i] + ROWS - 1) / ROWS : 0;
      for (int apart = 1; apart < 32; apart *= 2) {
        const int before = __shfl_up_sync(0xffffffff, tiles, apart);
        if (int(threadIdx.x) >= apart) tiles += before;
      }
      batch.tiles[i] = carried + tiles;
      carried += __shfl_sync(0xffffffff, tiles, 31);
    }
  }
  for (int i = threadIdx.x; i < MAX_TOKENS; i += THREADS) {
    int end = i + 1;
    while (end < MAX_TOKENS && batch.slot[end] == batch.slot[i]) end++;
    batch.until[i] = end;
  }
  __syncthreads();
  return batch.tiles[MAX_TOKENS - 1];
}

}  // namespace lk
