// PyTorch's log_softmax of a row, as far as the chosen token's value and rank need it: the maximum, the sum of the
// exponentials in PyTorch's order (a running sum in each lane of a vector, then the lanes), two subtractions. Where the
// choice is the likeliest token, that comes with the maximum.

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>

namespace {

using Vec = at::vec::Vectorized<float>;
using Bits = at::vec::Vectorized<int16_t>;
using at::BFloat16;

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
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(d, Vec(-104.0f), _CMP_NLT_UQ), _mm512_add_ps(Vec(1.0f), u), q);
#else
  return d.exp();
#endif
}

Vec load(const float* x) { return Vec::loadu(x); }

Vec load(const BFloat16* x) {
  Vec wide;
  at::vec::load_fp32_from_bf16(x, wide);
  return wide;
}

template <typename T>
Vec load(const T* x, int64_t count) {
  float some[Vec::size()] = {};
  for (int64_t i = 0; i < count; ++i) some[i] = static_cast<float>(x[i]);
  return Vec::loadu(some);
}

// at::vec::map_reduce_all, for rows of either type.
template <typename T>
float sum_of_exponentials(const T* row, int64_t vocab, Vec top) {
  auto plus = [](const Vec& a, const Vec& b) { return a + b; };
  if (vocab < Vec::size()) return at::vec::vec_reduce_all<float>(plus, exponential(load(row, vocab) - top), vocab);
  Vec sums = exponential(load(row) - top);
  int64_t i = Vec::size();
  for (; i + Vec::size() <= vocab; i += Vec::size()) sums = sums + exponential(load(row + i) - top);
  if (i < vocab) sums = Vec::set(sums, sums + exponential(load(row + i, vocab - i) - top), vocab - i);
  return at::vec::vec_reduce_all<float>(plus, sums);
}

// Not `maximum`, which takes longer to keep every NaN: where one gets lost here, the sum has it still.
float largest(const float* row, int64_t vocab) {
  return at::vec::reduce_all<float>([](const Vec& a, const Vec& b) { return at::vec::clamp_min(a, b); }, row, vocab);
}

// bfloat16's bits grow with a positive number, and as a negative one falls: read as integers, the largest number is the
// largest of them, or where all are negative, the smallest.
float largest(const BFloat16* row, int64_t vocab) {
  const auto* bits = reinterpret_cast<const int16_t*>(row);
  Bits most(std::numeric_limits<int16_t>::min()), least(std::numeric_limits<int16_t>::max());
  int64_t i = 0;
  for (; i + Bits::size() <= vocab; i += Bits::size()) {
    most = at::vec::maximum(most, Bits::loadu(bits + i));
    least = at::vec::minimum(least, Bits::loadu(bits + i));
  }
  int16_t mosts[Bits::size()], leasts[Bits::size()];
  most.store(mosts);
  least.store(leasts);
  int16_t high = *std::max_element(mosts, std::end(mosts)), low = *std::min_element(leasts, std::end(leasts));
  for (; i < vocab; ++i) {
    high = std::max(high, bits[i]);
    low = std::min(low, bits[i]);
  }
  return BFloat16(static_cast<uint16_t>(high < 0 ? low : high), BFloat16::from_bits());
}

// How many places of a row something holds at, and the first of them. ones: of a vector that begins at a place, a 1 where
// it does. In blocks, short enough to look through.
template <typename V, typename Ones, typename One>
int64_t count(int64_t vocab, int64_t& first, Ones ones, One one) {
  constexpr int64_t block = 64 * V::size();
  int64_t found = 0;
  first = -1;
  for (int64_t start = 0; start < vocab; start += block) {
    const int64_t end = std::min(vocab, start + block);
    V counts(0);
    int64_t i = start;
    for (; i + V::size() <= end; i += V::size()) counts = counts + ones(i);
    typename V::value_type lanes[V::size()];
    counts.store(lanes);
    int64_t here = 0;
    for (auto lane : lanes) here += static_cast<int64_t>(lane);
    for (; i < end; ++i) here += one(i);
    if (here > 0 && first < 0) {
      for (first = start; !one(first);) ++first;
    }
    found += here;
  }
  return found;
}

int64_t at_least(const float* row, int64_t vocab, float least, int64_t& first) {
  return count<Vec>(
      vocab, first, [=](int64_t i) { return load(row + i).ge(Vec(least)); }, [=](int64_t i) { return row[i] >= least; });
}

// Of a row without NaN. Against a positive number its bits compare as they are, against another with those of the
// magnitude turned round.
int64_t at_least(const BFloat16* row, int64_t vocab, BFloat16 least, int64_t& first) {
  const auto* bits = reinterpret_cast<const int16_t*>(row);
  const bool positive = static_cast<float>(least) > 0.0f;
  const auto turned = static_cast<int16_t>(positive ? 0 : 0x7fff);
  const auto bound = static_cast<int16_t>(positive ? least.x : (least.x | 0x8000) ^ 0x7fff);  // of both zeros, the lower
  return count<Bits>(
      vocab, first, [=](int64_t i) { return (Bits::loadu(bits + i) ^ Bits(turned)).ge(Bits(bound)); },
      [=](int64_t i) { return static_cast<int16_t>(bits[i] ^ turned) >= bound; });
}

float below(float x) { return std::nextafter(x, -std::numeric_limits<float>::infinity()); }

BFloat16 below(BFloat16 x) {
  if (static_cast<float>(x) > 0.0f) return BFloat16(static_cast<uint16_t>(x.x - 1), BFloat16::from_bits());
  const uint16_t lowest = 0xff80;  // -inf
  return BFloat16(std::min<uint16_t>((x.x | 0x8000) + 1, lowest), BFloat16::from_bits());
}

// token: where it is negative, the likeliest takes its place, the first where several are. Whether there is a number.
template <typename T>
bool score(const T* row, int64_t& token, int64_t vocab, float& logprob, int64_t& rank) {
  const float top = largest(row, vocab);
  float norm = sum_of_exponentials(row, vocab, Vec(top));
  at::vec::map([](const Vec& v) { return v.log(); }, &norm, &norm, 1);
  const T least = token < 0 ? T(top) : row[token];
  auto scored = [=](T x) { return static_cast<float>(x) - top - norm; };
  logprob = scored(least);
  rank = 0;
  if (std::isnan(logprob)) return false;
  int64_t first, other;
  rank = at_least(row, vocab, least, first);
  if (scored(below(least)) >= logprob) {  // as likely, once rounded
    rank = count<Vec>(
        vocab, other, [=](int64_t i) { return (load(row + i) - Vec(top) - Vec(norm)).ge(Vec(logprob)); },
        [=](int64_t i) { return scored(row[i]) >= logprob; });
  }
  if (token < 0) token = first;
  return true;
}

template <typename T>
bool scores(const T* logits, int64_t* tokens, float* logprobs, int64_t* ranks, int64_t rows, int64_t vocab, int threads) {
  bool numbers = true;
#pragma omp parallel for num_threads(threads) reduction(&& : numbers)
  for (int64_t r = 0; r < rows; ++r) {
    numbers = score(logits + r * vocab, tokens[r], vocab, logprobs[r], ranks[r]) && numbers;
  }
  return numbers;
}

}  // namespace

#define DEFINE(name, type)                                                                               \
  extern "C" bool name(const type* logits, int64_t* tokens, float* logprobs, int64_t* ranks, int64_t rows, \
                       int64_t vocab, int threads) {                                                     \
    return scores(logits, tokens, logprobs, ranks, rows, vocab, threads);                                \
  }
DEFINE(chosen_float32, float)
DEFINE(chosen_bfloat16, BFloat16)
