// The steps of tree.py for 64 rows of a warp group. Built with -fmad=false: nothing is contracted but what is written
// fma.
//
// A thread holds two rows: lane / 4 and 8 below, of its warp's 16; of each the columns 8 e + 2 (lane % 4) and the next:
// element 4 e + 2 h + i of an array is row h, column 8 e + 2 (lane % 4) + i. m, l, M and L are known to a row's four
// lanes.
constexpr int TILES_OF_SPLIT = 4;
#define NONE __int_as_float(0xff800000)  // -inf

__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Whether a split starts with tile j. Not j % (one or the other): that is a division.
__device__ __forceinline__ bool starts_split(int j) {
  return STEADY && j >= STEADY ? j % (2 * TILES_OF_SPLIT) == 0 : j % TILES_OF_SPLIT == 0;
}
// Steps 2 and 3, and alpha of step 4. ahead: how far this thread's first row is ahead of the tile's first key; the second
// is APART further. A maximum has no order: four chains, for speed.
template <int APART>
__device__ __forceinline__ void find_top(float (&x)[64], float (&m)[2], float (&alpha)[2], float (&base)[2], float c,
                                         bool masked, int ahead) {
  if (masked) {
    int seen = ahead - (threadIdx.x & 3) * 2;
#pragma unroll
    for (int i = 0; i < 64; i++)
      if (i / 4 * 8 + (i & 1) - (i & 2) / 2 * APART > seen) x[i] = NONE;
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float t[4];
#pragma unroll
    for (int e = 0; e < 4; e++) t[e] = fmaxf(x[4 * e + 2 * h], x[4 * e + 2 * h + 1]);
#pragma unroll
    for (int e = 4; e < 16; e++) t[e & 3] = fmaxf(fmaxf(t[e & 3], x[4 * e + 2 * h]), x[4 * e + 2 * h + 1]);
    float top = fmaxf(fmaxf(t[0], t[1]), fmaxf(t[2], t[3]));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(m[h], __fmul_rn(top, c));
    base[h] = top == NONE ? 0.0f : top;
    alpha[h] = ex2(__fsub_rn(m[h], base[h]));
    m[h] = top;
  }
}
// Steps 4 and 5 of row h: its x become p; returns their sum, by halving: keys 64, 32, 16, 8 apart are this thread's, then
// 4 and 2 apart its neighbours', then the two of a pair.
__device__ __forceinline__ float weigh(float (&x)[64], int h, float base, float c) {
#pragma unroll
  for (int e = 0; e < 16; e++) {
    x[4 * e + 2 * h] = ex2(__fmaf_rn(x[4 * e + 2 * h], c, -base));
    x[4 * e + 2 * h + 1] = ex2(__fmaf_rn(x[4 * e + 2 * h + 1], c, -base));
  }
  float r[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float y[8];
#pragma unroll
    for (int e = 0; e < 8; e++) y[e] = __fadd_rn(x[4 * e + 2 * h + i], x[4 * (e + 8) + 2 * h + i]);
#pragma unroll
    for (int n = 4; n > 0; n /= 2)
#pragma unroll
      for (int e = 0; e < n; e++) y[e] = __fadd_rn(y[e], y[e + n]);
    r[i] = __fadd_rn(y[0], __shfl_xor_sync(~0u, y[0], 2));
    r[i] = __fadd_rn(r[i], __shfl_xor_sync(~0u, r[i], 1));
  }
  return __fadd_rn(r[0], r[1]);
}
__device__ __forceinline__ void pack_all(uint32 (&p)[8][4], const float (&x)[64]) {
#pragma unroll
  for (int s = 0; s < 8; s++)
#pragma unroll
    for (int i = 0; i < 4; i++) p[s][i] = pack(x[8 * s + 2 * i], x[8 * s + 2 * i + 1]);
}
// Step 7 for M and L; the factors of A and of acc.
__device__ __forceinline__ void merge_scales(float (&M)[2], float (&L)[2], const float (&m)[2], const float (&l)[2],
                                             float (&a)[2], float (&b)[2]) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float top = fmaxf(M[h], m[h]);
    float base = top == NONE ? 0.0f : top;
    a[h] = ex2(__fsub_rn(M[h], base));
    b[h] = ex2(__fsub_rn(m[h], base));
    L[h] = __fmaf_rn(L[h], a[h], __fmul_rn(l[h], b[h]));
    M[h] = top;
  }
}
// Step 9
__device__ __forceinline__ void finish(float (&acc)[64], const float (&l)[2]) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float inverse = l[h] == 0.0f ? 0.0f : __fdiv_rn(1.0f, l[h]);
#pragma unroll
    for (int e = 2 * h; e < 64; e += 4) {
      acc[e] = __fmaf_rn(acc[e], inverse, 0.0f);
      acc[e + 1] = __fmaf_rn(acc[e + 1], inverse, 0.0f);
    }
  }
}
// Row h, straight from registers, from `to` on, this thread's first column: in fp32, and as an output.
__device__ __forceinline__ void write_floats(float* to, const float (&acc)[64], int h) {
#pragma unroll
  for (int e = 0; e < 16; e++, to += 8) *(float2*)to = make_float2(acc[4 * e + 2 * h], acc[4 * e + 2 * h + 1]);
}
__device__ __forceinline__ void write_row(void* out, long long to, const float (&acc)[64], int h) {
#if OUT32
  write_floats((float*)out + to, acc, h);
#else
#pragma unroll
  for (int e = 0; e < 16; e++, to += 8)
    *(uint32*)((unsigned short*)out + to) = pack(acc[4 * e + 2 * h], acc[4 * e + 2 * h + 1]);
#endif
}
