// Hopper's barriers, tensor memory access and tensor cores, as PTX names them.
//
// Macro: FP16 (of 16-bit elements; 0: bf16).
typedef unsigned int uint32;
typedef unsigned long long uint64;

struct alignas(64) TensorMap {
  char bytes[128];
};
constexpr int D = 128, T = 128;                   // columns and rows of a tile
constexpr int TILE = T * D * 2, HALF = TILE / 2;  // bytes; a half is 64 columns

__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

// --- mbarriers --------------------------------------------------------------------------------------------------------
__device__ __forceinline__ void init(uint32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
__device__ __forceinline__ void initialised() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void expect(uint32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void arrive(uint32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void wait(uint32 barrier, int phase) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra READY;\nbra "
      "AGAIN;\nREADY:\n}" ::"r"(barrier),
      "r"(phase)
      : "memory");
}

// --- TMA --------------------------------------------------------------------------------------------------------------
__device__ __forceinline__ void load_half(uint32 to, const TensorMap& from, int column, int row, uint32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(&from), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void load_tile(uint32 to, const TensorMap& from, int column, int row, uint32 barrier) {
  expect(barrier, TILE);
  load_half(to, from, column, row, barrier);
  load_half(to + HALF, from, column + 64, row, barrier);
}
// A tile of rows that are heads of tokens: of each of some tokens, heads from `head` on.
__device__ __forceinline__ void load_heads(uint32 to, const TensorMap& from, int head, int token, uint32 barrier) {
  expect(barrier, TILE);
#pragma unroll
  for (int half = 0; half < 2; half++)
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(
            to + half * HALF),
        "l"(&from), "r"(half * 64), "r"(head), "r"(token), "r"(barrier)
        : "memory");
}
__device__ __forceinline__ void store_heads(const TensorMap& to, int column, int head, int token, uint32 from) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(&to), "r"(column),
               "r"(head), "r"(token), "r"(from)
               : "memory");
}
// Shared memory that this thread's stores come from may be written again.
__device__ __forceinline__ void stored() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// What this thread wrote to shared memory is there for TMA and tensor cores.
__device__ __forceinline__ void written() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- tensor cores -----------------------------------------------------------------------------------------------------
// A tile's half in shared memory: rows of 128 bytes, swizzled, groups of 8 rows 1024 bytes apart.
__device__ __forceinline__ uint64 descriptor(uint32 address, int halves_apart) {
  return (uint64)1 << 62 | (uint64)(1024 >> 4) << 32 | (uint64)(halves_apart >> 4) << 16 | (address & 0x3ffff) >> 4;
}
__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void drain() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// The compiler must not move accumulators past here.
__device__ __forceinline__ void pin(float (&d)[64]) {
#pragma unroll
  for (int i = 0; i < 64; i++) asm volatile("" : "+f"(d[i])::"memory");
}
#if FP16
#define TYPES "f16.f16"
#else
#define TYPES "bf16.bf16"
#endif
#define WGMMA "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPES
#define D_64                                                                                                          \
  " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "  \
  "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "    \
  "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
#define D8(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define D64(d) D8(d, 0), D8(d, 8), D8(d, 16), D8(d, 24), D8(d, 32), D8(d, 40), D8(d, 48), D8(d, 56)
// d = a b (+ d where add), 64 rows, 16 deep: a in registers. TRANSPOSED: b is stored with its depth as rows.
template <int TRANSPOSED>
__device__ __forceinline__ void multiply(float (&d)[64], const uint32 (&a)[4], uint64 b, int add) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n" WGMMA D_64 "{%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}"
               : D64(d)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TRANSPOSED));
}
// x = q k^T, head size ascending
__device__ __forceinline__ void scores(float (&x)[64], const uint32 (&q)[8][4], uint32 k) {
#pragma unroll
  for (int s = 0; s < 8; s++) multiply<0>(x, q[s], descriptor(k, 0) + (s >> 2) * (HALF >> 4) + (s & 3) * 2, s > 0);
  commit();
}
// acc = p v (+ acc where add), keys ascending
__device__ __forceinline__ void values(float (&acc)[64], const uint32 (&p)[8][4], uint32 v, int add) {
#pragma unroll
  for (int s = 0; s < 8; s++) multiply<1>(acc, p[s], descriptor(v, HALF) + s * (2048 >> 4), s > 0 ? 1 : add);
  commit();
}
__device__ __forceinline__ uint32 pack(float low, float high) {
  uint32 y;
#if FP16
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#endif
  return y;
}
