// fuse_streams on the CPU, second pass of the forward: the kept channels of the result.
//
// Where the grids are equal a plane is one run; else a coarse row is blended along z and stretched along x once and held
// while the output rows beside it are blended along y. Both passes are one parallel region.
#pragma once

#include "native_statistics.h"

namespace {

// out = (in - shift) · gain, clipped before where a window is given, over n elements.
using AffineRun = void (*)(const FuseStreamsTensor& in, int64_t from, float shift, float gain, const float* window, int64_t n,
                           const FuseStreamsTensor& out, int64_t to);

// Voxels of an output whose neighbours along x are not neighbours in memory: made in a row first, which vectorises.
template <class Out, class Make>
void scatter(int64_t n, Out* __restrict q, int64_t step, Make make) {
  Out row[kPiece];
  for (int64_t start = 0; start < n; start += kPiece) {
    const int64_t length = least(kPiece, n - start);
    for (int64_t i = 0; i < length; ++i) from_float(make(start + i), row + i);
    for (int64_t i = 0; i < length; ++i) q[(start + i) * step] = row[i];
  }
}

template <class In, class Out>
void affine_run(const FuseStreamsTensor& in, int64_t from, float shift, float gain, const float* window, int64_t n,
                const FuseStreamsTensor& out, int64_t to) {
  const In* __restrict p = at<const In>(in, from);
  Out* __restrict q = at<Out>(out, to);
  const int64_t s = in.strides[4], t = out.strides[4];
  if (window) {
    const float lo = window[0], hi = window[1];
    for (int64_t i = 0; i < n; ++i) from_float(normalized(clip(to_float(p[i * s]), lo, hi), shift, gain), q + i * t);
  } else if (s == 1 && t == 1) {
    for (int64_t i = 0; i < n; ++i) from_float(normalized(to_float(p[i]), shift, gain), q + i);
  } else if (s == 1) {
    scatter(n, q, t, [=](int64_t i) { return normalized(to_float(p[i]), shift, gain); });
  } else {
    for (int64_t i = 0; i < n; ++i) from_float(normalized(to_float(p[i * s]), shift, gain), q + i * t);
  }
}

template <class Out>
AffineRun affine_from(int32_t in) {
  switch (in) {
    case kFloat32: return affine_run<float, Out>;
    case kFloat16: return affine_run<Half, Out>;
    case kBFloat16: return affine_run<BFloat16, Out>;
    case kInt16: return affine_run<int16_t, Out>;
    case kUInt8: return affine_run<uint8_t, Out>;
    default: return nullptr;
  }
}
AffineRun affine_for(int32_t in, int32_t out) {
  return of_float(out, affine_from<float>(in), affine_from<Half>(in), affine_from<BFloat16>(in));
}

// 1, 2 or 4 rows of the output that lie between the same two rows, each at a weight of its own.
using BlendRows = void (*)(const float* lower, const float* upper, const float* weights, int count, int64_t n,
                           const FuseStreamsTensor& out, int64_t to);

template <class Out>
void blend_rows(const float* __restrict lower, const float* __restrict upper, const float* weights, int count, int64_t n,
                const FuseStreamsTensor& out, int64_t to) {
  Out *__restrict q = at<Out>(out, to), *__restrict r = q + out.strides[3];
  if (out.strides[4] != 1) {
    for (int row = 0; row < count; ++row) {
      const float weight = weights[row];
      scatter(n, q + row * out.strides[3], out.strides[4], [=](int64_t i) { return mix(lower[i], upper[i], weight); });
    }
  } else if (count == 4) {
    Out *__restrict s = r + out.strides[3], *__restrict t = s + out.strides[3];
    const float wq = weights[0], wr = weights[1], ws = weights[2], wt = weights[3];
    for (int64_t i = 0; i < n; ++i) {
      from_float(mix(lower[i], upper[i], wq), q + i);
      from_float(mix(lower[i], upper[i], wr), r + i);
      from_float(mix(lower[i], upper[i], ws), s + i);
      from_float(mix(lower[i], upper[i], wt), t + i);
    }
  } else if (count == 2) {
    const float wq = weights[0], wr = weights[1];
    for (int64_t i = 0; i < n; ++i) {
      from_float(mix(lower[i], upper[i], wq), q + i);
      from_float(mix(lower[i], upper[i], wr), r + i);
    }
  } else if (count == 1) {
    const float weight = weights[0];
    for (int64_t i = 0; i < n; ++i) from_float(mix(lower[i], upper[i], weight), q + i);
  }
}
BlendRows blend_for(int32_t out) { return of_float<BlendRows>(out, blend_rows<float>, blend_rows<Half>, blend_rows<BFloat16>); }

// The taps along an axis, looked up: `tap` divides.
struct Taps {
  Scratch<Tap> taps;
  Taps(int64_t size, int64_t coarse) : taps(size) {
    for (int64_t i = 0; taps.data && i < size; ++i) taps.data[i] = tap(i, size, coarse);
  }
};

// The taps along x: a whole ratio has the same ones for every coarse voxel, any other has them in arrays.
struct Columns {
  int64_t ratio;  // 1, 2, 4, 8, or 0 for any other
  Scratch<int32_t> lo, hi;
  Scratch<float> weight;
  Columns(int64_t width, int64_t coarse) : lo(width), hi(width), weight(width) {
    const int64_t whole = width % coarse ? 0 : width / coarse;
    ratio = whole == 1 || whole == 2 || whole == 4 || whole == 8 ? whole : 0;
    if (!ok()) return;
    for (int64_t x = 0; x < width; ++x) {
      const Tap t = tap(x, width, coarse);
      lo.data[x] = int32_t(t.lo), hi.data[x] = int32_t(t.hi), weight.data[x] = t.weight;
    }
  }
  bool ok() const { return lo.data && hi.data && weight.data; }
};

// Output voxel ratio · i + j lies between padded voxels below(j) + i and the next, `weight(j)` from the lower.
template <int ratio>
struct Phase {
  static constexpr int below(int j) { return 2 * j + 1 >= ratio; }
  static constexpr float weight(int j) { return float(2 * j + 1 + (below(j) ? -ratio : ratio)) / float(2 * ratio); }
};

// A coarse row with each end repeated once (w + 2) to ratio · w voxels.
template <int ratio>
void stretch(const float* __restrict padded, int64_t w, float* __restrict out) {
  using P = Phase<ratio>;
  for (int64_t i = 0; i < w; ++i)
    for (int j = 0; j < ratio; ++j)
      out[ratio * i + j] = mix(padded[i + P::below(j)], padded[i + P::below(j) + 1], P::weight(j));
}

// line = (mix of two coarse rows - shift) · gain.
using BlendCoarse = void (*)(const FuseStreamsTensor& in, int64_t lower, int64_t upper, float weight, float shift, float gain,
                             int64_t n, float* line);

template <class In>
void blend_coarse(const FuseStreamsTensor& in, int64_t lower, int64_t upper, float weight, float shift, float gain, int64_t n,
                  float* __restrict line) {
  const In *__restrict p = at<const In>(in, lower), *__restrict q = at<const In>(in, upper);
  const int64_t s = in.strides[4];
  if (s == 1)
    for (int64_t x = 0; x < n; ++x) line[x] = normalized(mix(to_float(p[x]), to_float(q[x]), weight), shift, gain);
  else
    for (int64_t x = 0; x < n; ++x) line[x] = normalized(mix(to_float(p[x * s]), to_float(q[x * s]), weight), shift, gain);
}
BlendCoarse blend_coarse_for(int32_t in) { return of_float<BlendCoarse>(in, blend_coarse<float>, blend_coarse<Half>, blend_coarse<BFloat16>); }

// The coarse rows of one plane of one channel, as its output rows need them: blended along z, normalized and scaled while they
// are coarse, stretched along x. A plane's rows are all blended before the first is stretched: read back too soon, a row would
// have to wait for its own stores.
class Stretched {
 public:
  static int64_t memory(const Arguments& a) { return 2 * whole_lines(a.size[2]) + (a.coarse[1] + 1) * pitch(a); }

  void bind(const Arguments& a, LoadRow load, BlendCoarse blend, const Columns& columns, float* memory) {
    a_ = &a, load_ = load, blend_ = blend, columns_ = &columns;
    rows_ = memory, lines_ = memory + 2 * whole_lines(a.size[2]), other_ = lines_ + a.coarse[1] * pitch(a);
  }

  void start(int64_t n, int64_t c, const Tap& z, float shift, float gain) {
    const int64_t w = a_->coarse[2];
    for (int64_t y = 0; y < a_->coarse[1]; ++y) {
      float* line = this->line(y);
      if (per_voxel(*a_))
        blend_normalized(n, c, z, y, gain, line);
      else
        blend_(a_->features, offset_of(a_->features, n, c, z.lo, y), offset_of(a_->features, n, c, z.hi, y), z.weight, shift, gain, w, line);
      line[-1] = line[0], line[w] = line[w - 1];
    }
    held_[0] = held_[1] = -1;
  }

  // Neighbouring coarse rows have different parity, so the two that an output row lies between are both held.
  const float* row(int64_t y) {
    if (columns_->ratio == 1) return line(y);
    float* out = rows_ + (y & 1) * whole_lines(a_->size[2]);
    if (held_[y & 1] != y) stretch_line(line(y), out), held_[y & 1] = y;
    return out;
  }

 private:
  // A line has room for one voxel before it, its first repeated, and one after it.
  static int64_t pitch(const Arguments& a) { return kLineFloats + whole_lines(a.coarse[2] + 1); }
  float* line(int64_t y) const { return lines_ + y * pitch(*a_) + kLineFloats; }

  void blend_normalized(int64_t n, int64_t c, const Tap& z, int64_t y, float gain, float* __restrict line) const {
    float* __restrict upper = other_;
    load_normalized(n, c, z.lo, y, line);
    load_normalized(n, c, z.hi, y, upper);
    for (int64_t x = 0; x < a_->coarse[2]; ++x) line[x] = mix(line[x], upper[x], z.weight) * gain;
  }

  void load_normalized(int64_t n, int64_t c, int64_t z, int64_t y, float* __restrict row) const {
    const int64_t w = a_->coarse[2], plane = a_->coarse[1] * w, voxels = a_->coarse[0] * plane;
    const float* __restrict shift = a_->feature_stats + 2 * n * voxels + z * plane + y * w;
    const float* __restrict gain = shift + voxels;
    load_(a_->features.data, offset_of(a_->features, n, c, z, y), a_->features.strides[4], w, row);
    for (int64_t x = 0; x < w; ++x) row[x] = normalized(row[x], shift[x], gain[x]);
  }

  void stretch_line(const float* __restrict line, float* __restrict out) const {
    const int64_t w = a_->coarse[2];
    switch (columns_->ratio) {
      case 2: return stretch<2>(line - 1, w, out);
      case 4: return stretch<4>(line - 1, w, out);
      case 8: return stretch<8>(line - 1, w, out);
    }
    const int32_t *__restrict lo = columns_->lo.data, *__restrict hi = columns_->hi.data;
    const float* __restrict weight = columns_->weight.data;
    for (int64_t x = 0; x < a_->size[2]; ++x) out[x] = mix(line[lo[x]], line[hi[x]], weight[x]);
  }

  const Arguments* a_ = nullptr;
  LoadRow load_ = nullptr;
  BlendCoarse blend_ = nullptr;
  const Columns* columns_ = nullptr;
  float *rows_ = nullptr, *lines_ = nullptr, *other_ = nullptr;
  int64_t held_[2] = {-1, -1};
};

// What a kept channel of the output is made with.
struct Writer {
  const Arguments& a;
  const Columns& columns;
  const Taps planes, lines;  // along z and y
  AffineRun image = nullptr, feature = nullptr;
  BlendRows blend = nullptr;
  LoadRow load_features = nullptr;
  BlendCoarse blend_features = nullptr;
  bool narrow;  // two bytes a voxel: arithmetic counts, which rows share; floats come as fast as memory takes them, one by one
  bool same;    // the grids are equal and no statistics of single voxels are wanted: a feature channel is an affine map

  Writer(const Arguments& a_, const Columns& columns_)
      : a(a_), columns(columns_), planes(a.size[0], a.coarse[0]), lines(a.size[1], a.coarse[1]) {
    image = affine_for(a.image.type, a.out.type), blend = blend_for(a.out.type);
    feature = affine_for(a.features.type, a.out.type), load_features = load_for(a.features.type);
    blend_features = blend_coarse_for(a.features.type);
    narrow = element_size(a.out.type) == 2;
    same = same_grid(a) && !per_voxel(a);
  }
  bool ok() const { return planes.taps.data && lines.taps.data; }
  bool knows_types() const { return image && blend && (!a.feature_channels || (feature && load_features && blend_features)); }

  // Rows [y, y + count) of plane z, the same grid: one run where `count` rows follow each other.
  void affine(const Channel& k, int64_t z, int64_t y, int64_t count) const {
    const bool of_image = k.c < a.image_channels;
    const FuseStreamsTensor& in = of_image ? a.image : a.features;
    const int64_t c = of_image ? k.c : k.c - a.image_channels;
    const float* stats = of_image                       ? a.image_stats + 2 * k.n
                         : a.feature_norm == kInstance ? a.feature_stats + 2 * (k.n * a.feature_channels + c)
                                                        : nullptr;
    const float shift = stats ? stats[0] : 0.0f, gain = (stats ? stats[1] : 1.0f) * scale_of(a, k.n, k.c);
    const float window[2] = {a.norm_a, a.norm_b};
    (of_image ? image : feature)(in, offset_of(in, k.n, c, z, y), shift, gain,
                                 of_image && a.image_norm == kWindow ? window : nullptr, count * a.size[2], a.out,
                                 offset_of(a.out, k.n, k.c, z, y));
  }

  void start_plane(const Channel& k, Stretched& rows, int64_t z) const {
    const int64_t c = k.c - a.image_channels;
    const bool instance = a.feature_norm == kInstance;
    const float *stats = a.feature_stats + 2 * (k.n * a.feature_channels + c), scale = scale_of(a, k.n, k.c);
    rows.start(k.n, c, planes.taps.data[z], instance ? stats[0] : 0.0f, instance ? stats[1] * scale : scale);
  }

  // Rows [y, y + count) of plane z, which lie between the same two coarse rows.
  void interpolated(const Channel& k, Stretched& rows, int64_t z, int64_t y, int count) const {
    const Tap* t = lines.taps.data + y;
    float weights[4];
    for (int row = 0; row < count; ++row) weights[row] = t[row].weight;
    const float *lower = rows.row(t->lo), *upper = rows.row(t->hi);
    blend(lower, upper, weights, count, a.size[2], a.out, offset_of(a.out, k.n, k.c, z, y));
  }

  bool is_affine(const Channel& k) const { return k.c < a.image_channels || same; }

  bool alike(int64_t y, int64_t count) const {
    const Tap* t = lines.taps.data + y;
    return y + count <= a.size[1] && t[count - 1].lo == t->lo && t[count - 1].hi == t->hi;
  }

  // Planes [begin, end) of one channel, NCDHW.
  void channel(const Channel& k, int64_t begin, int64_t end, Stretched& rows) const {
    const int64_t height = a.size[1], width = a.size[2];
    if (is_affine(k)) {
      const bool one = joined(k.c < a.image_channels ? a.image : a.features, width);
      for (int64_t z = begin; z < end; ++z)
        for (int64_t y = 0; y < (one ? 1 : height); ++y) affine(k, z, y, one ? height : 1);
      return;
    }
    for (int64_t z = begin; z < end; ++z) {
      start_plane(k, rows, z);
      for (int64_t y = 0, count; y < height; y += count) {
        count = !narrow ? 1 : alike(y, 4) ? 4 : alike(y, 2) ? 2 : 1;
        interpolated(k, rows, z, y, int(count));
      }
    }
  }

  void drop(int64_t n, int64_t c, int64_t begin, int64_t end) const {
    const int64_t size = element_size(a.out.type), plane = a.size[1] * a.size[2] * size;
    clear(static_cast<char*>(a.out.data) + offset_of(a.out, n, c, begin, 0) * size, (end - begin) * plane,
          a.batch * a.out_channels * a.size[0] * plane);
  }

  // Plane z of a sample, channels-last: row by row, so that the voxels of a row stay in first-level cache for all channels.
  void voxels(int64_t n, int64_t z, const Kept& kept, Stretched* rows) const {
    const int64_t size = element_size(a.out.type), row_bytes = a.size[2] * a.out_channels * size;
    for (int64_t k = kept.images; k < kept.count; ++k)
      if (kept.channels.data[k].n == n && !same) start_plane(kept.channels.data[k], rows[kept.channels.data[k].c], z);
    for (int64_t y = 0; y < a.size[1]; ++y) {
      std::memset(static_cast<char*>(a.out.data) + offset_of(a.out, n, 0, z, y) * size, 0, size_t(row_bytes));
      for (int64_t i = 0; i < kept.count; ++i) {
        const Channel& k = kept.channels.data[i];
        if (k.n != n) continue;
        if (is_affine(k))
          affine(k, z, y, 1);
        else
          interpolated(k, rows[k.c], z, y, 1);
      }
    }
  }
};

int forward(const Arguments& a) {
  const Columns columns(a.size[2], a.coarse[2]);
  const Kept kept(a);
  const Statistics statistics(a, kept);
  const Writer writer(a, columns);
  if (!writer.knows_types()) return kBadType;
  if (!columns.ok() || !writer.ok() || !kept.channels.data || !statistics.extremes.data || !statistics.spreads.data) return kNoMemory;
  // Kept channels were not all measured: the others' statistics are defined all the same.
  if (a.feature_channels && a.feature_norm == kInstance)
    std::memset(a.feature_stats, 0, sizeof(float) * size_t(2 * a.batch * a.feature_channels));

  const int64_t plane = a.size[1] * a.size[2], streams = a.image_channels + a.feature_channels;
  const bool channels_last = a.out.strides[1] == 1 && a.out_channels > 1;
  const Blocks blocks(a.size[0], writer.same ? plane_of(a.features, a.feature_channels, plane) : plane);
  const int64_t cleared = channels_last ? 0 : a.batch * a.out_channels * blocks.count;
  const Tasks channels{kept, 0, kept.count, blocks.count, a.feature_channels && a.features.strides[4] != 1};
  const int64_t tasks = channels_last ? a.batch * blocks.count : channels.count();
  const int64_t row_memory = Stretched::memory(a), lanes = channels_last ? streams : 1;
  bool out_of_memory = false;
#pragma omp parallel num_threads(team(a, a.batch * a.out_channels * a.size[0] * plane))
  {
    Scratch<float> memory(lanes * row_memory), loaded(statistics.row_tasks() ? a.feature_channels * a.coarse[2] : 0);
    Scratch<Stretched> rows(lanes);
    const bool ok = memory.data && loaded.data && rows.data;
    if (!ok)
#pragma omp atomic write
      out_of_memory = true;
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < statistics.image_tasks(); ++i) statistics.image_task(i);
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < statistics.feature_tasks(); ++i) statistics.feature_task(i);
#pragma omp for schedule(dynamic, 8) nowait
    for (int64_t i = 0; i < statistics.row_tasks(); ++i)
      if (ok) voxel_statistics(a, statistics.load_features, i / (a.coarse[0] * a.coarse[1]), i % (a.coarse[0] * a.coarse[1]), loaded.data);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < cleared; ++i) {
      const int64_t channel = i / blocks.count, n = channel / a.out_channels, c = channel % a.out_channels;
      if (c >= streams || scale_of(a, n, c) == 0.0f) writer.drop(n, c, blocks.begin(i % blocks.count), blocks.end(i % blocks.count));
    }
#pragma omp single
    statistics.combine();
    // Backwards, so that what the statistics read last, and the cache still holds, is read first.
    for (int64_t c = 0; ok && c < lanes; ++c) {
      rows.data[c] = Stretched();
      rows.data[c].bind(a, writer.load_features, writer.blend_features, columns, memory.data + c * row_memory);
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = tasks - 1; i >= 0; --i) {
      if (!ok) continue;
      const Tasks::Task task = channels_last ? Tasks::Task{i / blocks.count, i % blocks.count} : channels.at(i);
      const int64_t begin = blocks.begin(task.block), end = blocks.end(task.block);
      if (channels_last)
        for (int64_t z = begin; z < end; ++z) writer.voxels(task.index, z, kept, rows.data);
      else
        writer.channel(channels.channel(task), begin, end, rows.data[0]);
    }
  }
  return out_of_memory ? kNoMemory : kOk;
}

}  // namespace
