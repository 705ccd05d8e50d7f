// PyTorch's log_softmax of a row, as far as the chosen token's value and rank need it: the maximum, the sum of the
// exponentials in PyTorch's order (a running sum in each lane of a vector, then the lanes), two subtractions.

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

using Vec = at::vec::Vectorized<float>;

// Not `maximum`, which takes longer to keep every NaN: where one gets lost here, the sum has it still.
Vec larger(const Vec& a, const Vec& b) { return at::vec::clamp_min(a, b); }

// exp for what log_softmax takes it of, at most 0: the algorithm of SLEEF's expf with an error of 1 ulp, which PyTorch
// calls for each vector, here without the call. 2^q times a polynomial in d - q ln 2, |d - q ln 2| <= ln 2 / 2.
// Its bits are compared with PyTorch's before the first use.
Vec exponential(const Vec& d) {
#if defined(CPU_CAPABILITY_AVX512)
  __m512 q = _mm512_roundscale_ps(d * Vec(1.442695040888963407359924681f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 s = _mm512_fnmadd_ps(q, Vec(0.693145751953125f), d);
  s = _mm512_fnmadd_ps(q, Vec(1.428606765330187045e-06f), s);
  __m512 u = Vec(0.000198527617612853646278381f);
  for (float c : {0.00139304355252534151077271f, 0.00833336077630519866943359f, 0.0416664853692054748535156f,
                  0.166666671633720397949219f, 0.5f}) {
    u = _mm512_fmadd_ps(u, s, Vec(c));
  }
  u = _mm512_fmadd_ps(_mm512_mul_ps(s, s), u, s);
  u = _mm512_scalef_ps(_mm512_add_ps(Vec(1.0f), u), q);
  return _mm512_mask_mov_ps(u, _mm512_cmp_ps_mask(d, Vec(-104.0f), _CMP_LT_OQ), _mm512_setzero_ps());
#else
  return d.exp();
#endif
}

// The row in float32, and its largest element. `room`: where it goes unless it is float32 already.
const float* widened(const float* row, float*, int64_t vocab, float& top) {
  top = at::vec::reduce_all<float>(larger, row, vocab);
  return row;
}

const float* widened(const at::BFloat16* row, float* room, int64_t vocab, float& top) {
  using Narrow = at::vec::Vectorized<at::BFloat16>;
  Vec most(-std::numeric_limits<float>::infinity()), others = most;
  int64_t i = 0;
  for (; i + Narrow::size() <= vocab; i += Narrow::size()) {
    auto [low, high] = at::vec::convert_bfloat16_float(Narrow::loadu(row + i));
    low.store(room + i);
    high.store(room + i + Vec::size());
    most = larger(most, low);
    others = larger(others, high);
  }
  top = at::vec::vec_reduce_all<float>(larger, larger(most, others));
  for (; i < vocab; ++i) {
    room[i] = static_cast<float>(row[i]);
    top = std::max(top, room[i]);
  }
  return room;
}

template <typename T>
void score(const T* row, int64_t token, float* room, int64_t vocab, float& logprob, int64_t& rank) {
  float top;
  const float* x = widened(row, room, vocab, top);
  float norm = at::vec::map_reduce_all<float>(
      [top](const Vec& v) { return exponential(v - Vec(top)); }, [](const Vec& a, const Vec& b) { return a + b; }, x, vocab);
  at::vec::map([](const Vec& v) { return v.log(); }, &norm, &norm, 1);
  logprob = x[token] - top - norm;
  // How many are as likely: ones added in each lane, exact up to 2^24.
  Vec counts(0.0f);
  int64_t i = 0;
  for (; i + Vec::size() <= vocab; i += Vec::size()) {
    counts = counts + (Vec::loadu(x + i) - Vec(top) - Vec(norm)).ge(Vec(logprob));
  }
  float lanes[Vec::size()];
  counts.store(lanes);
  rank = 0;
  for (float lane : lanes) rank += static_cast<int64_t>(lane);
  for (; i < vocab; ++i) rank += x[i] - top - norm >= logprob;
}

template <typename T>
void scores(const T* logits, const int64_t* tokens, float* logprobs, int64_t* ranks, int64_t rows, int64_t vocab,
            int threads) {
#pragma omp parallel num_threads(threads)
  {
    static thread_local std::vector<float> room;  // fresh memory for each call would be mapped page by page
    if (!std::is_same_v<T, float> && static_cast<int64_t>(room.size()) < vocab) room.resize(vocab);
#pragma omp for
    for (int64_t r = 0; r < rows; ++r) {
      score(logits + r * vocab, tokens[r], room.data(), vocab, logprobs[r], ranks[r]);
    }
  }
}

}  // namespace

#define DEFINE(name, type)                                                                                     \
  extern "C" void name(const type* logits, const int64_t* tokens, float* logprobs, int64_t* ranks, int64_t rows, \
                       int64_t vocab, int threads) {                                                           \
    scores(logits, tokens, logprobs, ranks, rows, vocab, threads);                                             \
  }
DEFINE(chosen_float32, float)
DEFINE(chosen_bfloat16, at::BFloat16)
