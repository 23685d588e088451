// fuse_streams on the CPU, first pass of the forward: the statistics of what is kept.
#pragma once

#include "native_work.h"

namespace {

struct Extremes {
  float lo, hi;  // infinite the wrong way round where nothing finite was seen
  void add(const Extremes& other) {
    lo = other.lo < lo ? other.lo : lo;
    hi = other.hi > hi ? other.hi : hi;
  }
};
constexpr Extremes kNothingSeen{HUGE_VALF, -HUGE_VALF};

// Reductions stay functions of their own: inlined into a parallel region, GCC does not vectorise them.
#define DGF_NOINLINE __attribute__((noinline))

DGF_NOINLINE Extremes extremes_of(const float* __restrict v, int64_t n) {
  float lo = HUGE_VALF, hi = -HUGE_VALF;
#pragma omp simd reduction(min : lo) reduction(max : hi)
  for (int64_t i = 0; i < n; ++i) {  // a NaN compares false
    lo = v[i] < lo ? v[i] : lo;
    hi = v[i] > hi ? v[i] : hi;
  }
  if (lo > hi || (finite(lo) && finite(hi))) return {lo, hi};
  lo = HUGE_VALF, hi = -HUGE_VALF;
  for (int64_t i = 0; i < n; ++i)
    if (finite(v[i])) lo = v[i] < lo ? v[i] : lo, hi = v[i] > hi ? v[i] : hi;
  return {lo, hi};
}

// The spread of the finite values among at most kPiece: two passes, the second corrected for the rounding of the mean.
DGF_NOINLINE Spread spread_of(const float* __restrict v, int64_t n) {
  float sum = 0, count = float(n);
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += v[i];
  const bool all = finite(sum);  // one that is not finite shows in the sum, and few pieces have one
  double known = sum;
  if (!all) {
    known = count = 0;
    for (int64_t i = 0; i < n; ++i)
      if (finite(v[i])) known += v[i], count += 1.0f;
    if (count == 0) return {0, 0, 0};
  }
  const float centre = float(known / count);
  float deviation = 0, square = 0;
  if (all) {
#pragma omp simd reduction(+ : deviation, square)
    for (int64_t i = 0; i < n; ++i) {
      deviation += v[i] - centre;
      square += (v[i] - centre) * (v[i] - centre);
    }
  } else {
    for (int64_t i = 0; i < n; ++i)
      if (finite(v[i])) deviation += v[i] - centre, square += (v[i] - centre) * (v[i] - centre);
  }
  const double slip = double(deviation) / count;
  return {count, centre + slip, square - slip * slip * count};
}

// Visit planes [begin, end) of one channel as pieces of at most kPiece floats.
template <class Visit>
void each_piece(const FuseStreamsTensor& t, LoadRow load, const int64_t* grid, int64_t n, int64_t c, int64_t begin, int64_t end,
                Visit visit) {
  float buffer[kPiece];
  const Runs runs(grid[1], grid[2], joined(t, grid[2]));
  for (int64_t z = begin; z < end; ++z)
    for (int64_t r = 0; r < runs.count; ++r)
      for (int64_t start = 0; start < runs.length; start += kPiece) {
        const int64_t length = least(kPiece, runs.length - start);
        visit(floats(t, load, offset_of(t, n, c, z, r) + start * t.strides[4], length, buffer), length);
      }
}

// "unit", "standard": (shift, gain) of every voxel of a coarse row over its channels. `loaded` holds (Cf, w).
void voxel_statistics(const Arguments& a, LoadRow load, int64_t n, int64_t row, float* __restrict loaded) {
  const int64_t height = a.coarse[1], width = a.coarse[2], channels = a.feature_channels;
  const int64_t voxels = a.coarse[0] * height * width;
  float* __restrict shift = a.feature_stats + 2 * n * voxels + row * width;
  float* __restrict gain = shift + voxels;
  for (int64_t x = 0; x < width; ++x) shift[x] = gain[x] = 0.0f;
  if (!any_kept(a, n, a.image_channels, a.image_channels + channels)) return;
  for (int64_t c = 0; c < channels; ++c)
    load(a.features.data, offset_of(a.features, n, c, row / height, row % height), a.features.strides[4], width, loaded + c * width);
  if (a.feature_norm == kStandard) {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t x = 0; x < width; ++x) shift[x] += loaded[c * width + x];
    for (int64_t x = 0; x < width; ++x) shift[x] /= float(channels);
  }
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t x = 0; x < width; ++x) {
      const float d = loaded[c * width + x] - shift[x];
      gain[x] += d * d;
    }
  for (int64_t x = 0; x < width; ++x) gain[x] = voxel_gain(a.feature_norm, gain[x], float(channels), a.eps);
}

struct Statistics {  // partial ones, of blocks of planes, and what becomes of them
  const Arguments& a;
  const Kept& kept;
  LoadRow load_image, load_features;
  Blocks image_blocks, feature_blocks;
  Scratch<Extremes> extremes;  // (N, Ci, blocks)
  Tasks features;
  Scratch<Spread> spreads;  // (kept channels of the features, blocks)

  Statistics(const Arguments& a_, const Kept& kept_)
      : a(a_), kept(kept_), load_image(load_for(a.image.type)), load_features(load_for(a.features.type)),
        image_blocks(a.size[0], a.size[1] * a.size[2]), feature_blocks(a.coarse[0], plane_of(a.features, a.feature_channels, a.coarse[1] * a.coarse[2])),
        extremes(image_tasks()), features{kept, kept.images, kept.count, feature_blocks.count, a.features.strides[4] != 1},
        spreads(feature_tasks()) {}

  bool of_image() const { return a.image_norm == kMinMax; }
  int64_t image_tasks() const { return of_image() ? a.batch * a.image_channels * image_blocks.count : 0; }
  int64_t feature_tasks() const { return a.feature_norm == kInstance ? features.count() : 0; }
  int64_t row_tasks() const {
    return a.feature_channels && per_voxel(a) ? a.batch * a.coarse[0] * a.coarse[1] : 0;
  }

  void image_task(int64_t task) const {
    const int64_t block = task % image_blocks.count, channel = task / image_blocks.count;
    const int64_t n = channel / a.image_channels, c = channel % a.image_channels;
    Extremes found = kNothingSeen;
    if (any_kept(a, n, 0, a.image_channels))  // they span the sample's image channels, so a dropped one is read for a kept one
      each_piece(a.image, load_image, a.size, n, c, image_blocks.begin(block), image_blocks.end(block),
                 [&](const float* v, int64_t length) { found.add(extremes_of(v, length)); });
    extremes.data[task] = found;
  }

  void feature_task(int64_t i) const {
    const Tasks::Task task = features.at(i);
    const Channel& k = features.channel(task);
    Spread found{0, 0, 0};
    each_piece(a.features, load_features, a.coarse, k.n, k.c - a.image_channels, feature_blocks.begin(task.block),
               feature_blocks.end(task.block), [&](const float* v, int64_t length) { unite(&found, spread_of(v, length)); });
    spreads.data[features.slot(task)] = found;
  }

  void combine() const {
    const int64_t each = a.image_channels * image_blocks.count;
    for (int64_t n = 0; n < a.batch; ++n) {
      float* stats = a.image_stats + 2 * n;
      if (!of_image()) {
        fixed_affine(a.image_norm, a.norm_a, a.norm_b, stats, stats + 1);
        continue;
      }
      Extremes all = kNothingSeen;
      for (int64_t i = n * each; i < (n + 1) * each; ++i) all.add(extremes.data[i]);
      minmax_affine(all.lo, all.hi, stats, stats + 1);
    }
    for (int64_t i = 0; i < feature_tasks(); i += feature_blocks.count) {
      Spread all{0, 0, 0};
      for (int64_t block = 0; block < feature_blocks.count; ++block) unite(&all, spreads.data[i + block]);
      const Channel& k = kept.channels.data[kept.images + i / feature_blocks.count];
      float* stats = a.feature_stats + 2 * (k.n * a.feature_channels + k.c - a.image_channels);
      instance_affine(all, a.eps, stats, stats + 1);
    }
  }
};

}  // namespace
