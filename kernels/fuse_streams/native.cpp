// fuse_streams on the CPU. The unit of work is a row along x: it is loaded to float, computed in first-level cache and
// stored once. Rows of a plane share their interpolated neighbours: each coarse row is blended along z and stretched
// along x once, and two of them at a time are blended along y.
#include "native.h"

#include <cmath>

namespace {

using Arguments = FuseStreamsArguments;

enum Status { kOk = 0, kNoMemory = 1, kBadType = 2, kOtherVersion = 3 };

constexpr int64_t kPiece = 1024;  // elements whose moments are taken in float before they are combined in double
constexpr int kLanes = 16;        // independent partial sums, so that the compiler can vectorise a strict reduction

int64_t offset_of(const FuseStreamsTensor& t, int64_t n, int64_t c, int64_t z, int64_t y) {
  return n * t.strides[0] + c * t.strides[1] + z * t.strides[2] + y * t.strides[3];
}

int64_t element_size(int32_t type) { return type == kFloat32 ? 4 : type == kUInt8 ? 1 : 2; }

// A plane (n, c, z) as runs of at most kPiece elements at an even stride: whole where its rows follow each other.
struct Runs {
  int64_t count, length, step, total;
  Runs(const FuseStreamsTensor& t, int64_t rows, int64_t width) {
    const bool joined = t.strides[3] == width * t.strides[4];
    count = joined ? 1 : rows;
    length = joined ? rows * width : width;
    step = joined ? 0 : t.strides[3];
    total = rows * width;
  }
  template <class Visit>
  void each(const FuseStreamsTensor& t, LoadRow load, int64_t offset, float* buffer, Visit visit) const {
    for (int64_t r = 0; r < count; ++r)
      for (int64_t start = 0; start < length; start += kPiece) {
        const int64_t n = least(kPiece, length - start);
        load(t.data, offset + r * step + start * t.strides[4], t.strides[4], n, buffer);
        visit(buffer, n);
      }
  }
};

// ---- statistics ----------------------------------------------------------------------------------------------------

struct Extremes {
  float lo, hi;
  void add(const float* v, int64_t n) {
    float los[kLanes], his[kLanes];
    for (int l = 0; l < kLanes; ++l) los[l] = lo, his[l] = hi;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
      for (int l = 0; l < kLanes; ++l) {
        const float x = v[i + l];
        los[l] = finite(x) & (x < los[l]) ? x : los[l];
        his[l] = finite(x) & (x > his[l]) ? x : his[l];
      }
    for (; i < n; ++i)
      if (finite(v[i])) add_value(v[i]);
    for (int l = 0; l < kLanes; ++l) add_value(los[l]), add_value(his[l]);
  }
  void add_value(float x) {
    // The starting values are infinite: what was never set says nothing.
    if (finite(x) && x < lo) lo = x;
    if (finite(x) && x > hi) hi = x;
  }
};

struct Moments {
  double count, mean, squares;  // squares: Σ (x - mean)²

  // Chan, Golub & LeVeque 1979: combining the moments of two sets.
  void add(const Moments& other) {
    if (other.count == 0) return;
    const double total = count + other.count, delta = other.mean - mean;
    mean += delta * other.count / total;
    squares += other.squares + delta * delta * count * other.count / total;
    count = total;
  }
};

// Moments of the finite values among at most kPiece: two passes, the second corrected for the rounding of the mean.
Moments moments_of(const float* v, int64_t n) {
  float sums[kLanes] = {}, counts[kLanes] = {};
  int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      const float x = v[i + l];
      sums[l] += finite(x) ? x : 0.0f;
      counts[l] += finite(x) ? 1.0f : 0.0f;
    }
  for (int64_t i = whole; i < n; ++i)
    if (finite(v[i])) sums[0] += v[i], counts[0] += 1.0f;
  double sum = 0, count = 0;
  for (int l = 0; l < kLanes; ++l) sum += sums[l], count += counts[l];
  if (count == 0) return {0, 0, 0};
  const float centre = float(sum / count);
  float deviations[kLanes] = {}, squares[kLanes] = {};
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      const float d = finite(v[i + l]) ? v[i + l] - centre : 0.0f;
      deviations[l] += d;
      squares[l] += d * d;
    }
  for (int64_t i = whole; i < n; ++i)
    if (finite(v[i])) {
      const float d = v[i] - centre;
      deviations[0] += d;
      squares[0] += d * d;
    }
  double deviation = 0, square = 0;
  for (int l = 0; l < kLanes; ++l) deviation += deviations[l], square += squares[l];
  return {count, centre + deviation / count, square - deviation * deviation / count};
}

bool dropped(const Arguments& a, int64_t n, int64_t c) {
  return a.scale[n * (a.image_channels + a.feature_channels) + c] == 0.0f;
}

bool all_dropped(const Arguments& a, int64_t n, int64_t from, int64_t to) {
  for (int64_t c = from; c < to; ++c)
    if (!dropped(a, n, c)) return false;
  return true;
}

// (shift, gain) of every sample's image. "minmax" reads the samples of which a channel is kept.
int image_statistics(const Arguments& a, LoadRow load) {
  const int64_t depth = a.size[0], tasks = a.batch * depth;
  if (a.image_norm != kMinMax) {
    const float shift = a.image_norm == kNoImageNorm ? 0.0f : a.norm_a;
    const float gain = a.image_norm == kWindow   ? 1.0f / (a.norm_b - a.norm_a)
                       : a.image_norm == kZScore ? 1.0f / a.norm_b
                                                 : 1.0f;
    for (int64_t n = 0; n < a.batch; ++n) a.image_stats[2 * n] = shift, a.image_stats[2 * n + 1] = gain;
    return kOk;
  }
  Scratch<Extremes> planes(tasks);
  if (!planes.data) return kNoMemory;
  const Runs runs(a.image, a.size[1], a.size[2]);
#pragma omp parallel for schedule(dynamic) num_threads(a.threads)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t n = task / depth, z = task % depth;
    Extremes extremes{HUGE_VALF, -HUGE_VALF};
    float buffer[kPiece];
    if (!all_dropped(a, n, 0, a.image_channels))
      for (int64_t c = 0; c < a.image_channels; ++c)
        runs.each(a.image, load, offset_of(a.image, n, c, z, 0), buffer,
                  [&](const float* v, int64_t length) { extremes.add(v, length); });
    planes.data[task] = extremes;
  }
  for (int64_t n = 0; n < a.batch; ++n) {
    Extremes extremes{HUGE_VALF, -HUGE_VALF};
    for (int64_t z = 0; z < depth; ++z) {
      extremes.add_value(planes.data[n * depth + z].lo);
      extremes.add_value(planes.data[n * depth + z].hi);
    }
    minmax_affine(extremes.lo, extremes.hi, a.image_stats + 2 * n, a.image_stats + 2 * n + 1);
  }
  return kOk;
}

// "instance": (shift, gain) of every kept sample and channel. Planes are combined in order, whatever the threads.
int channel_statistics(const Arguments& a, LoadRow load) {
  const int64_t depth = a.coarse[0], channels = a.feature_channels, tasks = a.batch * depth;
  Scratch<Moments> planes(tasks * channels);
  if (!planes.data) return kNoMemory;
  const Runs runs(a.features, a.coarse[1], a.coarse[2]);
#pragma omp parallel for schedule(dynamic) num_threads(a.threads)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t n = task / depth, z = task % depth;
    float buffer[kPiece];
    for (int64_t c = 0; c < channels; ++c) {
      Moments moments{0, 0, 0};
      if (!dropped(a, n, a.image_channels + c))
        runs.each(a.features, load, offset_of(a.features, n, c, z, 0), buffer,
                  [&](const float* v, int64_t length) { moments.add(moments_of(v, length)); });
      planes.data[task * channels + c] = moments;
    }
  }
  for (int64_t n = 0; n < a.batch; ++n)
    for (int64_t c = 0; c < channels; ++c) {
      Moments moments{0, 0, 0};
      for (int64_t z = 0; z < depth; ++z) moments.add(planes.data[(n * depth + z) * channels + c]);
      const double variance = moments.count > 0 ? moments.squares / moments.count : 0.0;
      float* stats = a.feature_stats + 2 * (n * channels + c);
      stats[0] = float(moments.mean);
      stats[1] = float(1.0 / std::sqrt((variance > 0 ? variance : 0.0) + double(a.eps)));
    }
  return kOk;
}

// "unit", "standard": (shift, gain) of every voxel over its channels.
int voxel_statistics(const Arguments& a, LoadRow load) {
  const int64_t depth = a.coarse[0], height = a.coarse[1], width = a.coarse[2], channels = a.feature_channels;
  const int64_t rows = depth * height, voxels = rows * width;
  int status = kOk;
#pragma omp parallel num_threads(a.threads)
  {
    Scratch<float> loaded(channels * width);
#pragma omp for schedule(dynamic, 8)
    for (int64_t task = 0; task < a.batch * rows; ++task) {
      if (!loaded.data) {
        status = kNoMemory;
        continue;
      }
      const int64_t n = task / rows, row = task % rows;
      float* __restrict shift = a.feature_stats + 2 * n * voxels + row * width;
      float* __restrict gain = shift + voxels;
      for (int64_t x = 0; x < width; ++x) shift[x] = gain[x] = 0.0f;
      if (all_dropped(a, n, a.image_channels, a.image_channels + channels)) continue;
      for (int64_t c = 0; c < channels; ++c)
        load(a.features.data, offset_of(a.features, n, c, row / height, row % height), a.features.strides[4], width,
             loaded.data + c * width);
      if (a.feature_norm == kStandard) {
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t x = 0; x < width; ++x) shift[x] += loaded.data[c * width + x];
        for (int64_t x = 0; x < width; ++x) shift[x] /= float(channels);
      }
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t x = 0; x < width; ++x) {
          const float d = loaded.data[c * width + x] - shift[x];
          gain[x] += d * d;
        }
      for (int64_t x = 0; x < width; ++x) {
        const float norm = std::sqrt(gain[x]);
        gain[x] = a.feature_norm == kStandard ? 1.0f / std::sqrt(gain[x] / float(channels) + a.eps)
                                              : 1.0f / (norm < a.eps ? a.eps : norm);
      }
    }
  }
  return status;
}

// ---- forward -------------------------------------------------------------------------------------------------------

struct Columns {  // the taps along x, as arrays
  Scratch<int32_t> lo, hi;
  Scratch<float> weight;
  bool same;
  Columns(int64_t width, int64_t coarse) : lo(width), hi(width), weight(width), same(width == coarse) {
    if (!ok()) return;
    for (int64_t x = 0; x < width; ++x) {
      const Tap t = tap(x, width, coarse);
      lo.data[x] = int32_t(t.lo), hi.data[x] = int32_t(t.hi), weight.data[x] = t.weight;
    }
  }
  bool ok() const { return lo.data && hi.data && weight.data; }
};

// The rows of one plane of features, as its output rows need them: blended along z, stretched along x.
class Stretched {
 public:
  Stretched(const Arguments& a, LoadRow load, const Columns& columns)
      : a_(a), load_(load), columns_(columns), rows_(2 * a.feature_channels * a.size[2]), lower_(a.coarse[2]),
        upper_(a.coarse[2]), held_(2 * a.feature_channels) {}

  bool ok() const { return rows_.data && lower_.data && upper_.data && held_.data; }

  void start_plane(int64_t n, int64_t z) {
    n_ = n;
    z_ = tap(z, a_.size[0], a_.coarse[0]);
    for (int64_t i = 0; i < 2 * a_.feature_channels; ++i) held_.data[i] = -1;
  }

  // Neighbouring coarse rows have different parity, so the two that an output row lies between are both held.
  const float* row(int64_t c, int64_t y) {
    const int64_t slot = 2 * c + (y & 1);
    float* out = rows_.data + slot * a_.size[2];
    if (held_.data[slot] != y) fill(c, y, out), held_.data[slot] = y;
    return out;
  }

 private:
  void load(int64_t c, int64_t z, int64_t y, float* __restrict row) {
    const int64_t width = a_.coarse[2];
    load_(a_.features.data, offset_of(a_.features, n_, c, z, y), a_.features.strides[4], width, row);
    if (a_.feature_norm != kUnit && a_.feature_norm != kStandard) return;
    const int64_t plane = a_.coarse[1] * width, voxels = a_.coarse[0] * plane;
    const float* __restrict shift = a_.feature_stats + 2 * n_ * voxels + z * plane + y * width;
    const float* __restrict gain = shift + voxels;
    for (int64_t x = 0; x < width; ++x) row[x] = (row[x] - shift[x]) * gain[x];
  }

  void fill(int64_t c, int64_t y, float* __restrict out) {
    float* __restrict lower = columns_.same ? out : lower_.data;
    load(c, z_.lo, y, lower);
    if (z_.hi != z_.lo) {
      float* __restrict upper = upper_.data;
      load(c, z_.hi, y, upper);
      for (int64_t x = 0; x < a_.coarse[2]; ++x) lower[x] = mix(lower[x], upper[x], z_.weight);
    }
    if (columns_.same) return;
    const int32_t *__restrict lo = columns_.lo.data, *__restrict hi = columns_.hi.data;
    const float* __restrict weight = columns_.weight.data;
    for (int64_t x = 0; x < a_.size[2]; ++x) out[x] = mix(lower[lo[x]], lower[hi[x]], weight[x]);
  }

  const Arguments& a_;
  const LoadRow load_;
  const Columns& columns_;
  Scratch<float> rows_, lower_, upper_;
  Scratch<int64_t> held_;
  int64_t n_ = 0;
  Tap z_{};
};

void image_row(const Arguments& a, LoadRow load, int64_t n, int64_t c, int64_t z, int64_t y, float* __restrict out) {
  const int64_t width = a.size[2];
  load(a.image.data, offset_of(a.image, n, c, z, y), a.image.strides[4], width, out);
  const float shift = a.image_stats[2 * n];
  const float gain = a.image_stats[2 * n + 1] * a.scale[n * (a.image_channels + a.feature_channels) + c];
  if (a.image_norm == kWindow)
    for (int64_t x = 0; x < width; ++x) out[x] = clip(out[x], a.norm_a, a.norm_b);
  for (int64_t x = 0; x < width; ++x) out[x] = (out[x] - shift) * gain;
}

void feature_row(const Arguments& a, Stretched& stretched, int64_t n, int64_t c, int64_t y, float* __restrict out) {
  const int64_t width = a.size[2];
  const Tap t = tap(y, a.size[1], a.coarse[1]);
  const float* __restrict lower = stretched.row(c, t.lo);
  const float* __restrict upper = stretched.row(c, t.hi);
  const bool instance = a.feature_norm == kInstance;
  const float* stats = a.feature_stats + 2 * (n * a.feature_channels + c);
  const float shift = instance ? stats[0] : 0.0f;
  const float scale = a.scale[n * (a.image_channels + a.feature_channels) + a.image_channels + c];
  const float gain = instance ? stats[1] * scale : scale;
  for (int64_t x = 0; x < width; ++x) out[x] = (mix(lower[x], upper[x], t.weight) - shift) * gain;
}

// Rows (C, W) of float to voxels of C channels each.
template <class T>
void store_voxels(const float* __restrict rows, int64_t channels, int64_t width, void* data, int64_t offset) {
  T* __restrict p = static_cast<T*>(data) + offset;
  for (int64_t x = 0; x < width; ++x)
    for (int64_t c = 0; c < channels; ++c) from_float(rows[c * width + x], p + x * channels + c);
}

int forward(const Arguments& a) {
  const LoadRow load_image = load_for(a.image.type);
  const LoadRow load_features = load_for(a.features.type);
  const StoreRow store = store_for(a.out.type);
  if (!load_image || !load_features || !store) return kBadType;
  const Columns columns(a.size[2], a.coarse[2]);
  if (!columns.ok()) return kNoMemory;
  if (const int status = image_statistics(a, load_image)) return status;
  if (a.feature_channels && a.feature_norm == kInstance)
    if (const int status = channel_statistics(a, load_features)) return status;
  if (a.feature_channels && (a.feature_norm == kUnit || a.feature_norm == kStandard))
    if (const int status = voxel_statistics(a, load_features)) return status;

  const int64_t depth = a.size[0], height = a.size[1], width = a.size[2], streams = a.image_channels + a.feature_channels;
  const bool channels_last = a.out.strides[1] == 1 && a.out_channels > 1;
  const auto store_tile = a.out.type == kFloat32   ? store_voxels<float>
                          : a.out.type == kFloat16 ? store_voxels<Half>
                                                   : store_voxels<BFloat16>;
  int status = kOk;
#pragma omp parallel num_threads(a.threads)
  {
    Stretched stretched(a, load_features, columns);
    Scratch<float> rows((channels_last ? a.out_channels : 1) * width);
    const bool ok = stretched.ok() && rows.data;
    if (ok && channels_last) std::memset(rows.data, 0, sizeof(float) * size_t(a.out_channels * width));
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < a.batch * depth; ++task) {
      if (!ok) {
        status = kNoMemory;
        continue;
      }
      const int64_t n = task / depth, z = task % depth;
      stretched.start_plane(n, z);
      for (int64_t y = 0; y < height; ++y) {
        for (int64_t c = 0; c < a.out_channels; ++c) {
          float* row = rows.data + (channels_last ? c * width : 0);
          const bool zero = c >= streams || dropped(a, n, c);
          const int64_t out = offset_of(a.out, n, c, z, y);
          if (zero && channels_last)
            std::memset(row, 0, sizeof(float) * size_t(width));
          else if (zero && !a.zeroed)
            std::memset(static_cast<char*>(a.out.data) + out * element_size(a.out.type), 0,
                        size_t(width * element_size(a.out.type)));
          else if (!zero && c < a.image_channels)
            image_row(a, load_image, n, c, z, y, row);
          else if (!zero)
            feature_row(a, stretched, n, c - a.image_channels, y, row);
          if (!zero && !channels_last) store(row, a.out.data, out, 1, width);
        }
        if (channels_last) store_tile(rows.data, a.out_channels, width, a.out.data, offset_of(a.out, n, 0, z, y));
      }
    }
  }
  return status;
}

// ---- backward ------------------------------------------------------------------------------------------------------

// grad_features[n, c] = scale · the transpose of the interpolation, of one channel's gradient. One thread per channel
// adds in the order of the voxels: deterministic.
int transpose_interpolation(const Arguments& a, LoadRow load_grad, const Columns& columns) {
  const int64_t depth = a.size[0], height = a.size[1], width = a.size[2];
  const int64_t w = a.coarse[2], plane = a.coarse[1] * w, voxels = a.coarse[0] * plane;
  int status = kOk;
#pragma omp parallel num_threads(a.threads)
  {
    Scratch<float> fine(width), line(w), layer(plane);
    const bool ok = fine.data && line.data && layer.data;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < a.batch * a.feature_channels; ++task) {
      const int64_t n = task / a.feature_channels, c = a.image_channels + task % a.feature_channels;
      float* __restrict out = a.grad_features + task * voxels;
      if (!(a.zeroed & 1)) std::memset(out, 0, sizeof(float) * size_t(voxels));
      if (!ok) status = kNoMemory;
      if (!ok || dropped(a, n, c)) continue;
      const float scale = a.scale[n * (a.image_channels + a.feature_channels) + c];
      for (int64_t z = 0; z < depth; ++z) {
        std::memset(layer.data, 0, sizeof(float) * size_t(plane));
        for (int64_t y = 0; y < height; ++y) {
          float* __restrict g = fine.data;
          load_grad(a.out.data, offset_of(a.out, n, c, z, y), a.out.strides[4], width, g);
          float* __restrict narrow = columns.same ? g : line.data;
          if (!columns.same) {
            std::memset(narrow, 0, sizeof(float) * size_t(w));
            for (int64_t x = 0; x < width; ++x) {
              const float upper = g[x] * columns.weight.data[x];
              narrow[columns.lo.data[x]] += g[x] - upper;
              narrow[columns.hi.data[x]] += upper;
            }
          }
          const Tap ty = tap(y, height, a.coarse[1]);
          float* __restrict lower = layer.data + ty.lo * w;
          for (int64_t x = 0; x < w; ++x) lower[x] += (1.0f - ty.weight) * narrow[x];
          float* __restrict upper = layer.data + ty.hi * w;
          if (ty.weight != 0.0f)
            for (int64_t x = 0; x < w; ++x) upper[x] += ty.weight * narrow[x];
        }
        const Tap tz = tap(z, depth, a.coarse[0]);
        const float lower_scale = scale * (1.0f - tz.weight), upper_scale = scale * tz.weight;
        float* __restrict lower = out + tz.lo * plane;
        for (int64_t i = 0; i < plane; ++i) lower[i] += lower_scale * layer.data[i];
        float* __restrict upper = out + tz.hi * plane;
        if (tz.weight != 0.0f)
          for (int64_t i = 0; i < plane; ++i) upper[i] += upper_scale * layer.data[i];
      }
    }
  }
  return status;
}

// Through (f - mean) · gain, in place: gain · (g - mean(g) - f̂ · mean(g · f̂)), over the voxels of each channel.
void instance_norm_backward(const Arguments& a, LoadRow load) {
  const int64_t depth = a.coarse[0], plane = a.coarse[1] * a.coarse[2], voxels = depth * plane;
  const Runs runs(a.features, a.coarse[1], a.coarse[2]);
#pragma omp parallel for schedule(dynamic) num_threads(a.threads)
  for (int64_t task = 0; task < a.batch * a.feature_channels; ++task) {
    const int64_t n = task / a.feature_channels, c = task % a.feature_channels;
    if (dropped(a, n, a.image_channels + c)) continue;
    const float shift = a.feature_stats[2 * task], gain = a.feature_stats[2 * task + 1];
    float* __restrict grad = a.grad_features + task * voxels;
    float buffer[kPiece];
    double sum = 0, product = 0;
    float* at = grad;
    for (int64_t z = 0; z < depth; ++z)
      runs.each(a.features, load, offset_of(a.features, n, c, z, 0), buffer, [&](const float* f, int64_t length) {
        float sums[kLanes] = {}, products[kLanes] = {};
        for (int64_t i = 0; i < length; ++i) {
          sums[i % kLanes] += at[i];
          products[i % kLanes] += at[i] * ((f[i] - shift) * gain);
        }
        for (int l = 0; l < kLanes; ++l) sum += sums[l], product += products[l];
        at += length;
      });
    const float mean = float(sum / double(voxels)), mean_product = float(product / double(voxels));
    at = grad;
    for (int64_t z = 0; z < depth; ++z)
      runs.each(a.features, load, offset_of(a.features, n, c, z, 0), buffer, [&](const float* f, int64_t length) {
        for (int64_t i = 0; i < length; ++i) at[i] = gain * (at[i] - mean - (f[i] - shift) * gain * mean_product);
        at += length;
      });
  }
}

// Through the same map with the statistics of each voxel over its channels. A norm below eps was held at eps.
int voxel_norm_backward(const Arguments& a, LoadRow load) {
  const int64_t height = a.coarse[1], width = a.coarse[2], rows = a.coarse[0] * height, voxels = rows * width;
  const int64_t channels = a.feature_channels;
  const bool standard = a.feature_norm == kStandard;
  int status = kOk;
#pragma omp parallel num_threads(a.threads)
  {
    Scratch<float> normalized(channels * width), means(width), products(width);
    const bool ok = normalized.data && means.data && products.data;
#pragma omp for schedule(dynamic, 8)
    for (int64_t task = 0; task < a.batch * rows; ++task) {
      if (!ok) {
        status = kNoMemory;
        continue;
      }
      const int64_t n = task / rows, row = task % rows;
      if (all_dropped(a, n, a.image_channels, a.image_channels + channels)) continue;
      const float* shift = a.feature_stats + 2 * n * voxels + row * width;
      const float* gain = shift + voxels;
      float *__restrict mean = means.data, *__restrict product = products.data;
      for (int64_t x = 0; x < width; ++x) mean[x] = product[x] = 0.0f;
      for (int64_t c = 0; c < channels; ++c) {
        float* __restrict f = normalized.data + c * width;
        const float* __restrict g = a.grad_features + (n * channels + c) * voxels + row * width;
        load(a.features.data, offset_of(a.features, n, c, row / height, row % height), a.features.strides[4], width, f);
        for (int64_t x = 0; x < width; ++x) {
          f[x] = (f[x] - shift[x]) * gain[x];
          mean[x] += g[x];
          product[x] += g[x] * f[x];
        }
      }
      for (int64_t x = 0; x < width; ++x) {
        const bool held = !standard && gain[x] >= 1.0f / a.eps;
        mean[x] = standard ? mean[x] / float(channels) : 0.0f;
        product[x] = standard ? product[x] / float(channels) : held ? 0.0f : product[x];
      }
      for (int64_t c = 0; c < channels; ++c) {
        const float* __restrict f = normalized.data + c * width;
        float* __restrict g = a.grad_features + (n * channels + c) * voxels + row * width;
        for (int64_t x = 0; x < width; ++x) g[x] = gain[x] * (g[x] - mean[x] - f[x] * product[x]);
      }
    }
  }
  return status;
}

// scale · gain · gradient; zero where a window clipped.
int image_backward(const Arguments& a, LoadRow load_grad) {
  const int64_t depth = a.size[0], height = a.size[1], width = a.size[2];
  const bool window = a.image_norm == kWindow;
  const LoadRow load_image = window ? load_for(a.image.type) : nullptr;
  const StoreRow store = store_for(a.grad_image.type);
  if (!store || (window && !load_image)) return kBadType;
  int status = kOk;
#pragma omp parallel num_threads(a.threads)
  {
    Scratch<float> grads(width), values(width);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < a.batch * a.image_channels * depth; ++task) {
      if (!grads.data || !values.data) {
        status = kNoMemory;
        continue;
      }
      const int64_t n = task / (a.image_channels * depth), c = task / depth % a.image_channels, z = task % depth;
      const bool zero = dropped(a, n, c);
      const float gain = a.image_stats[2 * n + 1] * a.scale[n * (a.image_channels + a.feature_channels) + c];
      float *__restrict g = grads.data, *__restrict v = values.data;
      for (int64_t y = 0; y < height; ++y) {
        if (!zero) load_grad(a.out.data, offset_of(a.out, n, c, z, y), a.out.strides[4], width, g);
        for (int64_t x = 0; x < width; ++x) g[x] = zero ? 0.0f : g[x] * gain;
        if (window && !zero) {
          load_image(a.image.data, offset_of(a.image, n, c, z, y), a.image.strides[4], width, v);
          for (int64_t x = 0; x < width; ++x) g[x] = v[x] < a.norm_a || v[x] > a.norm_b ? 0.0f : g[x];
        }
        store(g, a.grad_image.data, offset_of(a.grad_image, n, c, z, y), a.grad_image.strides[4], width);
      }
    }
  }
  return status;
}

int backward(const Arguments& a) {
  const LoadRow load_grad = load_for(a.out.type);
  if (!load_grad) return kBadType;
  if (a.grad_image.data)
    if (const int status = image_backward(a, load_grad)) return status;
  if (!a.grad_features) return kOk;
  const LoadRow load = load_for(a.features.type);
  const Columns columns(a.size[2], a.coarse[2]);
  if (!load) return kBadType;
  if (!columns.ok()) return kNoMemory;
  if (const int status = transpose_interpolation(a, load_grad, columns)) return status;
  if (a.feature_norm == kInstance) instance_norm_backward(a, load);
  return a.feature_norm == kUnit || a.feature_norm == kStandard ? voxel_norm_backward(a, load) : kOk;
}

}  // namespace

DGF_ENTRY(fuse_streams_forward, FuseStreamsArguments) {
  return arguments->bytes == sizeof(FuseStreamsArguments) ? forward(*arguments) : kOtherVersion;
}

DGF_ENTRY(fuse_streams_backward, FuseStreamsArguments) {
  return arguments->bytes == sizeof(FuseStreamsArguments) ? backward(*arguments) : kOtherVersion;
}
