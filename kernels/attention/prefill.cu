// Prefill on Hopper, head size 128, causal: the tree of tree.py by hand, where a compiler's schedule costs a tenth.
//
// A program per multiprocessor takes one item after the other from a counter: 128 rows of one KV head, which are PACK of
// its query heads of 128 / PACK tokens, so that few tokens fill a tensor core too. A producer thread brings tiles by TMA;
// two warp groups of 64 rows work beside each other: while one's products run, the other weighs. Within a group, the
// scores of tile j are computed beside P V of tile j - 1.
//
// PIECES: where few items would leave the card idle, the plan has cut their keys into pieces, as decode's (decode.py): the
// piece that begins a sequence merges its splits here, of the others every split is left to combine.py.
//
// Macros: HEADS, PACK (query heads, and of an item), GROUP (query heads of a KV head), PAGE (slots), FP16 (0: bf16),
// OUT32 (1: fp32 output), PIECES (0, 1), STEADY (tree.py's, in tiles; 0: never).
#include "hopper.cuh"
#include "tree.cuh"

struct Arguments {
  TensorMap q, k, v, o;  // heads of tokens, rows of slots, rows of slots, heads of tokens
  void* out;
  float *state, *kept;  // of a split, of a row: m and l; acc
  const int *blocks, *counts, *page_table;
  int* taken;  // blocks handed out, programs done: 0 between launches
  float c;     // scores to log2 units
  int page_table_row, out_token, row_page, row_head, column_head;
};

constexpr long long L2_BYTES = 32 << 20;
constexpr int STAGES = 2, TOKENS = T / PACK;
constexpr int APART = 8 / PACK;  // tokens from a thread's first row to its second, which is 8 below
// Shared memory: Q, the rings of K and V, of both groups A and then the output, barriers, the work at hand.
constexpr int GROUP_SHARED = 64 * D * 4, OUT_HALF = 64 * 64 * 2;  // bytes of a group; of half of its output
constexpr int Q_AT = 0, K_AT = Q_AT + TILE, V_AT = K_AT + STAGES * TILE, A_AT = V_AT + STAGES * TILE;
constexpr int BARRIERS_AT = A_AT + 2 * GROUP_SHARED, WORK_AT = BARRIERS_AT + 128;

__device__ __forceinline__ float4 merged_four(float4 y, const float* acc, const float (&a)[2], const float (&b)[2]) {
  return make_float4(__fmaf_rn(y.x, a[0], __fmul_rn(acc[0], b[0])), __fmaf_rn(y.y, a[0], __fmul_rn(acc[1], b[0])),
                     __fmaf_rn(y.z, a[1], __fmul_rn(acc[2], b[1])), __fmaf_rn(y.w, a[1], __fmul_rn(acc[3], b[1])));
}

// What the producer tells of an item. start, tokens, oldest: first token, how many, position of the first. head: the
// first; -1 at the end. first, end: tiles. slot: -1 for a whole item, else where its splits are kept, in rows of tokens:
// -2 - slot of a merged beginning. block: tokens from split to split there.
struct alignas(16) Work {
  int start, tokens, oldest, head, first, end, slot, block;
};

// Leaves 64 rows of a split, or of a merge of several, to combine.py. row: where the item's first token is kept.
__device__ __forceinline__ void keep(const Arguments& a, int row, int head, int w, int rows, const float (&m)[2],
                                     const float (&l)[2], const float (&acc)[64]) {
  int r = w * 64 + (threadIdx.x & 127) / 32 * 16 + (threadIdx.x & 31) / 4;
#pragma unroll
  for (int h = 0; h < 2; h++, r += 8)
    if (r < rows) {
      long long at = (long long)(row + r / PACK) * HEADS + head + r % PACK;
      if ((threadIdx.x & 3) == 0) *(float2*)(a.state + at * 2) = make_float2(m[h], l[h]);
      write_floats(a.kept + at * D + (threadIdx.x & 3) * 2, acc, h);
    }
}

// --- the two kinds of warps -------------------------------------------------------------------------------------------
struct Barriers {
  uint32 q_full, q_free, k_full, k_free, v_full, v_free;  // those of stages: of the first, 8 bytes each
  __device__ explicit Barriers(uint32 shared)
      : q_full(shared + BARRIERS_AT), q_free(q_full + 16), k_full(q_full + 32), k_free(q_full + 48), v_full(q_full + 64),
        v_free(q_full + 80) {}
};

// By a warp that has read a stage.
__device__ __forceinline__ void release(uint32 barrier) {
  if ((threadIdx.x & 31) == 0) arrive(barrier);
}

__device__ __forceinline__ void produce(const Arguments& a, uint32 shared, volatile Work* work, const Barriers& bars) {
  // Items beside each other: those of KV heads whose keys and values fit the L2 cache together, packs of all KV heads.
  int blocks = a.counts[1], i = 0, n = 0, keys = blocks ? a.blocks[2] + a.blocks[3] : 1, packs = GROUP / PACK;
  while (HEADS / PACK % (2 * packs) == 0 && 2 * packs * PACK / GROUP * (long long)keys * 4 * D <= L2_BYTES) packs *= 2;
  const int parts = PACK == 1 ? 1 : a.counts[3], side = packs * parts, items = blocks * (HEADS / PACK) * parts;
  for (int item = atomicAdd(a.taken, 1), next; item < items; item = next) {
    int round = item / (blocks * side), place = item % (blocks * side), at = place % side;
    const int* block = a.blocks + place / side * 8;  // those of many keys come first
    int head = (round * packs + at / parts) * PACK, kv = head / GROUP, before = at % parts * TOKENS;
    int start = block[1] + before, tokens = min(block[2] - before, TOKENS), oldest = block[3] + before;
    int first = 0, end = (oldest + tokens - 1) / T + 1, slot = -1;
    if (PIECES) {
      slot = block[6];
      // All of a block's rows have its pieces, so that each has something to keep: what a row does not see changes nothing.
      if (slot != -1) first = block[4] * TILES_OF_SPLIT, end = (block[3] + block[2] - 1) / T + 1;
      end = min(end, block[5] * TILES_OF_SPLIT);
    }
    if (tokens <= 0 || first >= end) {
      next = atomicAdd(a.taken, 1);
      continue;
    }
    const int* pages = a.page_table + (long long)block[0] * a.page_table_row;
#pragma unroll 1
    for (int j = first; j < end; j++, i++) {
      int stage = i % STAGES, phase = (i / STAGES & 1) ^ 1;
      int row = pages[j * T / PAGE] * a.row_page + kv * a.row_head + j * T % PAGE;
      wait(bars.k_free + 8 * stage, phase);
      load_tile(shared + K_AT + stage * TILE, a.k, kv * a.column_head, row, bars.k_full + 8 * stage);
      if (j == first) {
        wait(bars.q_free, n++ & 1 ^ 1);
        work->start = start, work->tokens = tokens, work->oldest = oldest, work->head = head;
        work->first = first, work->end = end, work->block = block[2];
        work->slot = slot == -1 ? -1 : slot < 0 ? slot - before : slot + before;
        load_heads(shared + Q_AT, a.q, head, start, bars.q_full);
      }
      if (j == end - 1) next = atomicAdd(a.taken, 1);  // no earlier: another program may be free by now
      wait(bars.v_free + 8 * stage, phase);
      load_tile(shared + V_AT + stage * TILE, a.v, kv * a.column_head, row, bars.v_full + 8 * stage);
    }
  }
  wait(bars.q_free, n & 1 ^ 1);
  work->head = -1;  // the end
  arrive(bars.q_full);
  // The last program that takes: for the next launch
  if (atomicAdd(a.taken + 1, 1) == gridDim.x - 1) a.taken[0] = a.taken[1] = 0;
}

// w: which of the two groups
__device__ __forceinline__ void consume(const Arguments& a, char* memory, uint32 shared, const volatile Work* work,
                                        const Barriers& bars, int w) {
  const float c = a.c;
  int me = threadIdx.x & 127, lane = threadIdx.x & 31;
  char* own = memory + A_AT + w * GROUP_SHARED;
  float4* A_shared = (float4*)own + me;  // this thread's, every 128th
  auto together = [&] { asm volatile("bar.sync %0, 128;" ::"r"(w + 3) : "memory"); };
  int i = 0;  // tiles so far
  for (int n = 0;; n++) {
    uint32 q_at = shared + Q_AT + w * 64 * 128;
    wait(bars.q_full, n & 1);
    int start = uniform(work->start), rows = uniform(work->tokens) * PACK, oldest = uniform(work->oldest);
    int head = uniform(work->head), first = uniform(work->first), tiles = uniform(work->end);
    int slot = uniform(work->slot), block = uniform(work->block);
    if (head < 0) break;
    if (w * 64 >= rows) {  // no row of this group
      release(bars.q_free);
      for (int j = first; j < tiles; j++, i++) {
        wait(bars.k_full + 8 * (i % STAGES), i / STAGES & 1);
        release(bars.k_free + 8 * (i % STAGES));
        wait(bars.v_full + 8 * (i % STAGES), i / STAGES & 1);
        release(bars.v_free + 8 * (i % STAGES));
      }
      continue;
    }
    int plain = (oldest + 1) / T;  // tiles that every row sees whole come first
    int position = oldest + (w * 64 + me / 32 * 16 + lane / 4) / PACK;  // of this thread's first row
    float x[64], acc[64], m[2] = {NONE, NONE}, l[2], M[2] = {NONE, NONE}, L[2] = {0, 0}, alpha[2], base[2];
    uint32 q[8][4], p[8][4];
#pragma unroll
    for (int s = 0; s < 8; s++) {  // 16 rows of this warp, 16 columns
      int row = me / 32 * 16 + (lane & 15), chunk = (s & 3) * 2 + (lane >> 4);
      uint32 at = q_at + (s >> 2) * HALF + row * 128 + ((chunk ^ (row & 7)) << 4);
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(q[s][0]), "=r"(q[s][1]), "=r"(q[s][2]), "=r"(q[s][3])
                   : "r"(at));
    }
    wait(bars.k_full + 8 * (i % STAGES), i / STAGES & 1);
    fence();
    scores(x, q, shared + K_AT + i % STAGES * TILE);
    drain<0>();
    pin(x);
    release(bars.k_free + 8 * (i % STAGES));
    release(bars.q_free);
    find_top<APART>(x, m, alpha, base, c, first >= plain, position - first * T);
    l[0] = weigh(x, 0, base[0], c);
    l[1] = weigh(x, 1, base[1], c);
    pack_all(p, x);
    bool merged = false;
    int add = 0;
    i++;
    for (int j = first + 1; j < tiles; j++, i++) {
      int stage = i % STAGES, before = (i - 1) % STAGES;
      wait(bars.k_full + 8 * stage, i / STAGES & 1);
        pin(acc);
      fence();
      scores(x, q, shared + K_AT + stage * TILE);
      wait(bars.v_full + 8 * before, (i - 1) / STAGES & 1);
      fence();
      values(acc, p, shared + V_AT + before * TILE, add);
        drain<1>();
      pin(x);
      release(bars.k_free + 8 * stage);
      bool starts = starts_split(j);
      float old[2] = {m[0], m[1]}, r[2];
      if (starts) m[0] = m[1] = NONE;
      find_top<APART>(x, m, alpha, base, c, j >= plain, position - j * T);
      r[0] = weigh(x, 0, base[0], c);
      r[1] = weigh(x, 1, base[1], c);
      // Passes at once. A branch, so that the compiler leaves what is above beside P V.
      wait(bars.v_full + 8 * before, (i - 1) / STAGES & 1);
      drain<0>();
      pin(acc);
      release(bars.v_free + 8 * before);
      if (starts) {
        if (PIECES && slot >= 0) {
          keep(a, slot, head, w, rows, old, l, acc);
          slot += block;
        } else if (!merged) {
          if (me == 0) stored();  // the last block's output
          together();
          // A first split is kept as it is: there b is 1, or 0 where l and acc are
          M[0] = old[0], M[1] = old[1], L[0] = l[0], L[1] = l[1];
#pragma unroll
          for (int e = 0; e < 64; e += 4) A_shared[e * 32] = make_float4(acc[e], acc[e + 1], acc[e + 2], acc[e + 3]);
        } else {
          float A_scale[2], acc_scale[2];
          merge_scales(M, L, old, l, A_scale, acc_scale);
#pragma unroll
          for (int e = 0; e < 64; e += 4) A_shared[e * 32] = merged_four(A_shared[e * 32], acc + e, A_scale, acc_scale);
        }
        merged = !PIECES || slot < 0;
        l[0] = l[1] = 0;
      }
      add = !starts;
      l[0] = __fmaf_rn(l[0], alpha[0], r[0]), l[1] = __fmaf_rn(l[1], alpha[1], r[1]);
      if (!starts)
#pragma unroll
        for (int e = 0; e < 64; e++) acc[e] = __fmul_rn(acc[e], alpha[e / 2 & 1]);
      pack_all(p, x);
    }
    int last = (i - 1) % STAGES;
    wait(bars.v_full + 8 * last, (i - 1) / STAGES & 1);
    pin(acc);
    fence();
    values(acc, p, shared + V_AT + last * TILE, add);
    drain<0>();
    pin(acc);
    release(bars.v_free + 8 * last);
    if (merged) {
      float A_scale[2], acc_scale[2];
      merge_scales(M, L, m, l, A_scale, acc_scale);
      m[0] = M[0], m[1] = M[1], l[0] = L[0], l[1] = L[1];
#pragma unroll
      for (int e = 0; e < 64; e += 4) {
        float4 y = merged_four(A_shared[e * 32], acc + e, A_scale, acc_scale);
        acc[e] = y.x, acc[e + 1] = y.y, acc[e + 2] = y.z, acc[e + 3] = y.w;
      }
    }
    if (PIECES && slot != -1) {
      keep(a, slot < 0 ? -2 - slot : slot, head, w, rows, m, l, acc);
      continue;
    }
    finish(acc, l);
    int row = me / 32 * 16 + lane / 4;
    if (OUT32 || rows < w * 64 + 64) {  // straight from registers
#pragma unroll
      for (int h = 0; h < 2; h++) {
        int r = w * 64 + row + 8 * h;
        if (r < rows)
          write_row(a.out, (long long)(start + r / PACK) * a.out_token + (head + r % PACK) * D + (lane & 3) * 2, acc, h);
      }
    } else {  // by TMA, through this group's shared memory
      if (me == 0) stored();
      together();  // and all have read their A
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int e = 0; e < 16; e++) {
          char* to = own + e / 8 * OUT_HALF + (row + 8 * h) * 128 + (((e & 7) ^ (row & 7)) << 4) + (lane & 3) * 4;
          *(uint32*)to = pack(acc[4 * e + 2 * h], acc[4 * e + 2 * h + 1]);
        }
      written();
      together();
      if (me == 0) {
        uint32 from = (uint32)__cvta_generic_to_shared(own);
        store_heads(a.o, 0, head, start + w * 64 / PACK, from);
        store_heads(a.o, 64, head, start + w * 64 / PACK, from + OUT_HALF);
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
      }
    }
  }
  if (me == 0) stored();
}

extern "C" __global__ void __launch_bounds__(384, 1) prefill(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) char memory[];
  uint32 shared = (uint32)__cvta_generic_to_shared(memory);
  Work* work = (Work*)(memory + WORK_AT);
  Barriers bars(shared);
  if (PIECES) asm volatile("griddepcontrol.launch_dependents;");  // combine, which waits for the end of this grid
  if (threadIdx.x == 0) {
    init(bars.q_full, 1);
    init(bars.q_free, 8);  // warps that compute
    for (int s = 0; s < STAGES; s++) {
      init(bars.k_full + 8 * s, 1);
      init(bars.v_full + 8 * s, 1);
      init(bars.k_free + 8 * s, 8);
      init(bars.v_free + 8 * s, 8);
    }
    initialised();
  }
  __syncthreads();
  if (threadIdx.x < 128) {  // the producer's group
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == 0) produce(a, shared, work, bars);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    consume(a, memory, shared, work, bars, uniform(threadIdx.x / 128) - 1);
  }
}
