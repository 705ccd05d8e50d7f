// Prefill on Hopper, head size 128, causal: the tree of tree.py by hand, where a compiler's schedule costs a tenth.
//
// A program per multiprocessor takes (block of 128 query tokens, head) after the other from a counter. A producer thread
// brings tiles by TMA; two warp groups of 64 rows work beside each other: while one's products run, the other weighs.
// Within a group, the scores of tile j are computed beside P V of tile j - 1.
//
// CLUSTER 2: the same block of two heads of one KV head, in a cluster of two programs; either brings half of every tile
// of keys and values to both, so that the L2 cache is read half as often.
//
// Macros: HEADS, GROUP (query heads, and of a KV head), PAGE (slots), FP16 (0: bf16), OUT32 (1: fp32 output), CLUSTER
// (1, or 2 where GROUP is even).
#include "hopper.cuh"
#include "tree.cuh"

struct Arguments {
  TensorMap q, k, v, o;  // rows of tokens, of slots, of slots, of tokens
  void* out;
  const int *blocks, *counts, *page_table;
  int* taken;  // blocks handed out, programs done: 0 between launches
  float c;     // scores to log2 units
  int page_table_row, out_token, row_page, row_head, column_head;
};

constexpr long long L2_BYTES = 32 << 20;
constexpr int STAGES = 2;
// Shared memory: Q, the rings of K and V, of both groups A and then the output, barriers, the work at hand.
constexpr int GROUP_SHARED = 64 * D * 4, OUT_HALF = 64 * 64 * 2;  // bytes of a group; of half of its output
constexpr int Q_AT = 0, K_AT = Q_AT + TILE, V_AT = K_AT + STAGES * TILE, A_AT = V_AT + STAGES * TILE;
constexpr int BARRIERS_AT = A_AT + 2 * GROUP_SHARED, WORK_AT = BARRIERS_AT + 128;
constexpr int ITEMS = 4, ITEMS_AT = WORK_AT + 16;  // of the cluster's second program: what it is to do, by turns

__device__ __forceinline__ float4 merged_four(float4 y, const float* acc, const float (&a)[2], const float (&b)[2]) {
  return make_float4(__fmaf_rn(y.x, a[0], __fmul_rn(acc[0], b[0])), __fmaf_rn(y.y, a[0], __fmul_rn(acc[1], b[0])),
                     __fmaf_rn(y.z, a[1], __fmul_rn(acc[2], b[1])), __fmaf_rn(y.w, a[1], __fmul_rn(acc[3], b[1])));
}

// --- the two kinds of warps -------------------------------------------------------------------------------------------
struct Barriers {
  uint32 q_full, q_free, k_full, k_free, v_full, v_free, items;  // those of stages: of the first, 8 bytes each
  __device__ explicit Barriers(uint32 shared)
      : q_full(shared + BARRIERS_AT), q_free(q_full + 16), k_full(q_full + 32), k_free(q_full + 48), v_full(q_full + 64),
        v_free(q_full + 80), items(q_full + 96) {}
};

__device__ __forceinline__ void bring(uint32 to, const TensorMap& from, int column, int row, uint32 barrier, int rank) {
  if (CLUSTER == 2)
    share_tile(to, from, column, row, barrier, rank);
  else
    load_tile(to, from, column, row, barrier);
}
// By a warp that has read a stage, to whoever brings tiles into it.
__device__ __forceinline__ void release(uint32 barrier) {
  int lane = threadIdx.x & 31;
  if (CLUSTER == 2) {
    if (lane < 2) arrive_at(barrier, lane);
  } else if (lane == 0) {
    arrive(barrier);
  }
}

__device__ __forceinline__ void produce(const Arguments& a, char* memory, uint32 shared, int4* work,
                                        const Barriers& bars) {
  const int rank = CLUSTER == 2 ? cluster_rank() : 0;
  int blocks = a.counts[1], items = blocks * (HEADS / CLUSTER), i = 0, n = 0;
  // Heads beside each other: those of KV heads whose keys and values fit the L2 cache together.
  int keys = blocks ? a.blocks[2] + a.blocks[3] : 1, heads = GROUP;
  while (HEADS % (2 * heads) == 0 && 2 * heads / GROUP * (long long)keys * 4 * D <= L2_BYTES) heads *= 2;
  int next = rank == 0 ? atomicAdd(a.taken, 1) : 0;
  for (;; n++) {
    int item = next;
    if (CLUSTER == 2) {
      // The first program tells the second. It is at most two tiles ahead, so three blocks, and has four places.
      int turn = n % ITEMS;
      if (rank == 0) {
        tell(shared + ITEMS_AT + 4 * turn, bars.items + 8 * turn, 1, item);
      } else {
        wait_cluster(bars.items + 8 * turn, n / ITEMS & 1);
        item = *(volatile int*)(memory + ITEMS_AT + 4 * turn);
      }
    }
    if (item >= items) break;
    if (rank == 0) next = atomicAdd(a.taken, 1);  // on its way during this block
    item *= CLUSTER;
    int round = item / (blocks * heads), place = item % (blocks * heads);
    const int* block = a.blocks + place / heads * 4;  // those of many keys come first
    int head = round * heads + place % heads + rank, kv = head / GROUP;
    int start = block[1], rows = block[2], oldest = block[3], tiles = (oldest + rows - 1) / T + 1;
    const int* pages = a.page_table + (long long)block[0] * a.page_table_row;
#pragma unroll 1
    for (int j = 0; j < tiles; j++, i++) {
      int stage = i % STAGES, phase = (i / STAGES & 1) ^ 1;
      int row = pages[j * T / PAGE] * a.row_page + kv * a.row_head + j * T % PAGE;
      wait(bars.k_free + 8 * stage, phase);
      bring(shared + K_AT + stage * TILE, a.k, kv * a.column_head, row, bars.k_full + 8 * stage, rank);
      if (j == 0) {
        wait(bars.q_free, n & 1 ^ 1);
        *work = make_int4(start, rows, oldest, head);
        load_tile(shared + Q_AT, a.q, head * D, start, bars.q_full);
      }
      wait(bars.v_free + 8 * stage, phase);
      bring(shared + V_AT + stage * TILE, a.v, kv * a.column_head, row, bars.v_full + 8 * stage, rank);
    }
  }
  wait(bars.q_free, n & 1 ^ 1);
  *work = make_int4(0, 0, 0, -1);  // the end
  arrive(bars.q_full);
  // The last program that takes: for the next launch
  if (rank == 0 && atomicAdd(a.taken + 1, 1) == gridDim.x / CLUSTER - 1) a.taken[0] = a.taken[1] = 0;
}

// w: which of the two groups
__device__ __forceinline__ void consume(const Arguments& a, char* memory, uint32 shared, const int4* work,
                                        const Barriers& bars, int w) {
  const float c = a.c;
  int me = threadIdx.x & 127, lane = threadIdx.x & 31;
  bool signals = lane == 0;
  char* own = memory + A_AT + w * GROUP_SHARED;
  float4* A_shared = (float4*)own + me;  // this thread's, every 128th
  auto together = [&] { asm volatile("bar.sync %0, 128;" ::"r"(w + 3) : "memory"); };
  int i = 0;  // tiles so far
  for (int n = 0;; n++) {
    uint32 q_at = shared + Q_AT + w * 64 * 128;
    wait(bars.q_full, n & 1);
    int4 block = *work;
    int start = uniform(block.x), rows = uniform(block.y), oldest = uniform(block.z), head = uniform(block.w);
    if (head < 0) break;
    int plain = (oldest + 1) / T, tiles = (oldest + rows - 1) / T + 1;  // tiles that every row sees whole come first
    int position = oldest + w * 64 + me / 32 * 16 + lane / 4;           // of this thread's first row
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
    if (signals) arrive(bars.q_free);
    find_top(x, m, alpha, base, c, plain == 0, position);
    l[0] = weigh(x, 0, base[0], c);
    l[1] = weigh(x, 1, base[1], c);
    pack_all(p, x);
    bool merged = false;
    int add = 0;
    i++;
    for (int j = 1; j < tiles; j++, i++) {
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
      bool starts = j % TILES_OF_SPLIT == 0;
      float old[2] = {m[0], m[1]}, r[2];
      if (starts) m[0] = m[1] = NONE;
      find_top(x, m, alpha, base, c, j >= plain, position - j * T);
      r[0] = weigh(x, 0, base[0], c);
      r[1] = weigh(x, 1, base[1], c);
      // Passes at once. A branch, so that the compiler leaves what is above beside P V.
      wait(bars.v_full + 8 * before, (i - 1) / STAGES & 1);
      drain<0>();
      pin(acc);
      release(bars.v_free + 8 * before);
      if (starts) {
        if (!merged) {
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
        merged = true;
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
      l[0] = L[0], l[1] = L[1];
#pragma unroll
      for (int e = 0; e < 64; e += 4) {
        float4 y = merged_four(A_shared[e * 32], acc + e, A_scale, acc_scale);
        acc[e] = y.x, acc[e + 1] = y.y, acc[e + 2] = y.z, acc[e + 3] = y.w;
      }
    }
    finish(acc, l);
    int row = me / 32 * 16 + lane / 4, first = start + w * 64, there = rows - w * 64;
    if (OUT32 || there < 64) {  // straight from registers
#pragma unroll
      for (int h = 0; h < 2; h++)
        if (row + 8 * h < there)
          write_row(a.out, (long long)(first + row + 8 * h) * a.out_token + head * D + (lane & 3) * 2, acc, h);
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
        store_half(a.o, head * D, first, from);
        store_half(a.o, head * D + 64, first, from + OUT_HALF);
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
      }
    }
  }
  if (me == 0) stored();
}

#if CLUSTER == 2
#define SHAPE __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
#else
#define SHAPE __launch_bounds__(384, 1)
#endif
extern "C" __global__ void SHAPE prefill(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) char memory[];
  uint32 shared = (uint32)__cvta_generic_to_shared(memory);
  int4* work = (int4*)(memory + WORK_AT);
  Barriers bars(shared);
  if (threadIdx.x == 0) {
    init(bars.q_full, 1);
    init(bars.q_free, 8);  // warps that compute
    for (int s = 0; s < STAGES; s++) {
      init(bars.k_full + 8 * s, 1);
      init(bars.v_full + 8 * s, 1);
      init(bars.k_free + 8 * s, 8 * CLUSTER);
      init(bars.v_free + 8 * s, 8 * CLUSTER);
    }
    for (int t = 0; t < ITEMS; t++) init(bars.items + 8 * t, 1);
    initialised();
  }
  if (CLUSTER == 2) cluster_together();
  __syncthreads();
  if (threadIdx.x < 128) {  // the producer's group
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == 0) produce(a, memory, shared, work, bars);
    __syncwarp();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    consume(a, memory, shared, work, bars, uniform(threadIdx.x / 128) - 1);
  }
  if (CLUSTER == 2) cluster_together();  // neither ends while the other may still write to it
}
