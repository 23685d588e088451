// intensity_chain on the CPU: its arguments, and the functions that its loops are made of.
//
// Everything here is inlined into loops without branches, which GCC vectorises at every level. The polynomials are minimax
// fits. Errors are the largest found against float64, with and without fused multiply-adds; an ulp is a unit in the last place.
#pragma once

#include <cmath>

#include "../native.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Fields as native.py's Arguments.
struct IntensityChainArguments {
  int64_t bytes, batch, channels;
  int64_t size[3];
  const void* image;  // (N, C, D, H, W), contiguous
  float* out;         // the same; may be the image
  const int64_t* seed;
  const float *noise_std, *rician_std, *bias, *gamma, *brightness, *contrast;
  const uint8_t* rescale;
  int32_t image_type, threads;
};

struct StandardNormalArguments {
  int64_t bytes, batch, size;  // size: voxels of a sample
  const int64_t* seed;
  float* out;  // (N, size)
  int32_t stream, threads;
};

namespace {

// Lanes of 64 bits, as many as a vector has, and the products of their low halves: compilers do not find that instruction.
#if defined(__AVX512F__)
constexpr int kLaneBytes = 64;
#elif defined(__AVX2__)
constexpr int kLaneBytes = 32;
#else
constexpr int kLaneBytes = 16;
#endif
typedef uint64_t Lanes __attribute__((vector_size(kLaneBytes)));
constexpr int kLanes = kLaneBytes / 8;

inline Lanes product(Lanes a, uint32_t b) {
#if defined(__AVX512F__)
  return Lanes(_mm512_maskz_mul_epu32(0xff, __m512i(a), _mm512_set1_epi64(b)));  // the one without a mask warns in GCC 12
#elif defined(__AVX2__)
  return Lanes(_mm256_mul_epu32(__m256i(a), _mm256_set1_epi64x(b)));
#elif defined(__SSE2__)
  return Lanes(_mm_mul_epu32(__m128i(a), _mm_set1_epi64x(b)));
#else
  return (a & 0xffffffffu) * uint64_t(b);
#endif
}

// Philox4x32-10 (Salmon et al. 2011): of each lane the counter (c[0], …, c[3]) becomes four words, under the key (k0, k1).
// Words are the low halves; what the high halves hold means nothing.
inline void philox(Lanes* c, uint32_t k0, uint32_t k1) {
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Lanes first = product(c[0], 0xD2511F53u), second = product(c[2], 0xCD9E8D57u);
    c[0] = (second >> 32) ^ c[1] ^ uint64_t(k0);
    c[2] = (first >> 32) ^ c[3] ^ uint64_t(k1);
    c[1] = second;
    c[3] = first;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Natural logarithm of a normal number; on [2^-32, 1] off by at most 1.3 ulp, also near 1.
inline float log_of(float x) {
  const uint32_t bits = to_bits(x);
  const int32_t exponent = int32_t(bits - 0x3f3504f3u) >> 23;  // x = 2^exponent · (1 + f), 1 + f in [√½, √2)
  const float f = from_bits(bits - (uint32_t(exponent) << 23)) - 1.0f;
  float p = 0.087004364f;
  p = p * f - 0.14267488f;
  p = p * f + 0.14914767f;
  p = p * f - 0.16577585f;
  p = p * f + 0.19963063f;
  p = p * f - 0.25001338f;
  p = p * f + 0.3333391f;
  const float square = f * f;
  return float(exponent) * 0.69314718f + (f + square * (p * f - 0.5f));
}

// 2^y for y in [-126, 127]; off by at most 1.2 ulp.
inline float exp2_of(float y) {
  const float shifted = y + 12582912.0f;  // 1.5 · 2^23: leaves y's nearest whole number in the low bits
  const float r = y - (shifted - 12582912.0f);
  float p = 0.00015353362f;
  p = p * r + 0.0013398875f;
  p = p * r + 0.009618437f;
  p = p * r + 0.055503324f;
  p = p * r + 0.24022648f;
  p = p * r + 0.6931472f;
  p = p * r + 1.0f;
  return p * from_bits((to_bits(shifted) << 23) + 0x3f800000u);
}

// Two normals of two words: Box and Muller; see reference.py. Off by at most 3.1 · 2^-24 of their radius, the root of the sum of
// their squares.
inline void box_muller(uint32_t first, uint32_t second, float* a, float* b) {
  const float u = float(int32_t(first >> 1)) * 0x1p-31f + 0x1p-32f;
  const float radius = __builtin_sqrtf(-2.0f * log_of(u));
  const uint32_t quarter = (second + 0x20000000u) >> 30;
  const float r = float(int32_t(second << 2)) * 0x1p-32f, t = r * r;
  const float sine = r * (((-0.0046021771f * t + 0.079680227f) * t - 0.64596349f) * t + 1.57079637f);
  const float cosine = (((0.00090402167f * t - 0.020860288f) * t + 0.25366923f) * t - 1.23370051f) * t + 1.0f;
  const bool odd = quarter & 1;
  const float along = odd ? sine : cosine, across = odd ? cosine : sine;
  *a = radius * from_bits(to_bits(along) ^ (((quarter + 1) & 2) << 30));
  *b = radius * from_bits(to_bits(across) ^ ((quarter & 2) << 30));
}

}  // namespace
