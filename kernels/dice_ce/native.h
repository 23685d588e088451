// dice_ce on the CPU: the C interface, and the arithmetic of a score.
//
// Shapes: N batch, C classes, V = D·H·W voxels.
#pragma once

#include "../native.h"

extern "C" {

struct DiceCeArguments {
  int64_t bytes;  // sizeof(DiceCeArguments), so that a library of another version refuses
  int64_t batch, classes, voxels;
  const void* scores;     // (N, C, V), or (N, V, C) where the classes of a voxel lie together
  const void* label;      // (N, V)
  float* loss;            // (): written forward
  float* coefficients;    // (N, C, 2): written forward, read backward
  const float* grad;      // (): the gradient to the loss
  void* grad_scores;      // as the scores: written backward
  int32_t type;           // Type of kernels/native.h, of the scores: float32, float16 or bfloat16
  int32_t label_bytes;    // of a label: 1, 2, 4 or 8; what is read as a number without a sign and is ≥ C is no class
  int32_t channels_last;  // 1: (N, V, C)
  int32_t first_class;    // of the Dice term: 0, or 1 without the background
  int32_t threads;
};
}

namespace {

constexpr int64_t kMostClasses = 128;  // a product of kRun sums of so many exponentials is below 2^1023
constexpr float kSmooth = 1e-5f;       // MONAI's, of numerator and denominator

// e^x for x ≤ 0, off by at most 1.5 ulp; 0 below -87, also for -inf. NaN stays NaN.
inline float exp_of(float x) {
  const float y = x < -87.0f ? -87.0f : x;
  const float shifted = y * 1.44269504f + 12582912.0f;  // 1.5 · 2^23: leaves the nearest whole number in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;  // log 2 in two parts; the first has few digits
  float p = 0.0013941119f;
  p = p * r + 0.0083751343f;
  p = p * r + 0.0416663513f;
  p = p * r + 0.1666641533f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const float e = p * from_bits((to_bits(shifted) << 23) + 0x3f800000u);
  return x < -87.0f ? 0.0f : e;
}

}  // namespace
