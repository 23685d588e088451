// fuse_streams on the CPU, backward: every coarse row gathers the gradient rows that it reached, weighted along z and y, and
// folds the sum along x; then the normalization's own gradient on the coarse grid.
#pragma once

#include "native_forward.h"

namespace {

// Which output voxels each coarse voxel is a tap of along one axis, and with what weight: a range of them.
struct Reach {
  Scratch<int64_t> first, start;  // (coarse), (coarse + 1): its weights lie from start[i] to start[i + 1]
  Scratch<float> weight;          // at most two for an output voxel
  Reach(int64_t size, int64_t coarse) : first(coarse), start(coarse + 1), weight(2 * size) {
    if (!ok()) return;
    std::memset(start.data, 0, sizeof(int64_t) * size_t(coarse + 1));
    for (int64_t i = 0; i < coarse; ++i) first.data[i] = size;
    for (int64_t o = size - 1; o >= 0; --o) {
      const Tap t = tap(o, size, coarse);
      ++start.data[t.lo + 1], first.data[t.lo] = o;
      if (t.hi != t.lo) ++start.data[t.hi + 1], first.data[t.hi] = o;
    }
    for (int64_t i = 0; i < coarse; ++i) start.data[i + 1] += start.data[i];
    for (int64_t o = 0; o < size; ++o) {
      const Tap t = tap(o, size, coarse);
      weight.data[start.data[t.lo] + o - first.data[t.lo]] = t.hi == t.lo ? 1.0f : 1.0f - t.weight;
      if (t.hi != t.lo) weight.data[start.data[t.hi] + o - first.data[t.hi]] = t.weight;
    }
  }
  bool ok() const { return first.data && start.data && weight.data; }
  int64_t count(int64_t i) const { return start.data[i + 1] - start.data[i]; }
};

// sum += Σ weight · row over up to four rows, so that the sum is loaded and stored once for them.
using AddRows = void (*)(const FuseStreamsTensor& t, const int64_t* offsets, const float* weights, int count, int64_t n, float* sum);

template <class T>
void add_rows(const FuseStreamsTensor& t, const int64_t* offsets, const float* weights, int count, int64_t n, float* __restrict sum) {
  const int64_t s = t.strides[4];
  if (count == 4 && s == 1) {
    const T *__restrict p = at<const T>(t, offsets[0]), *__restrict q = at<const T>(t, offsets[1]);
    const T *__restrict r = at<const T>(t, offsets[2]), *__restrict u = at<const T>(t, offsets[3]);
    const float wp = weights[0], wq = weights[1], wr = weights[2], wu = weights[3];
    for (int64_t i = 0; i < n; ++i) sum[i] += wp * to_float(p[i]) + wq * to_float(q[i]) + (wr * to_float(r[i]) + wu * to_float(u[i]));
    return;
  }
  for (int k = 0; k < count; ++k) {
    const T* __restrict p = at<const T>(t, offsets[k]);
    if (s == 1)
      for (int64_t i = 0; i < n; ++i) sum[i] += weights[k] * to_float(p[i]);
    else
      for (int64_t i = 0; i < n; ++i) sum[i] += weights[k] * to_float(p[i * s]);
  }
}
AddRows add_for(int32_t type) { return of_float<AddRows>(type, add_rows<float>, add_rows<Half>, add_rows<BFloat16>); }

// The transpose of `stretch`, unpadded: `fine` has 2 · ratio zeros on either side.
template <int ratio>
void fold(const float* __restrict fine, int64_t w, float* __restrict out) {
  using P = Phase<ratio>;
  const auto padded = [fine](int64_t k) {
    float sum = 0;
    for (int j = 0; j < ratio; ++j) {
      const int64_t i = ratio * (k - P::below(j)) + j;
      sum += (1.0f - P::weight(j)) * fine[i] + P::weight(j) * fine[i - ratio];
    }
    return sum;
  };
  for (int64_t i = 0; i < w; ++i) out[i] = padded(i + 1);
  out[0] += padded(0);
  out[w - 1] += padded(w + 1);
}

// Gradients of coarse rows through the interpolation.
class Gather {
 public:
  static constexpr int64_t kMargin = 16;  // 2 · the largest ratio that `fold` knows
  static int64_t memory(const Arguments& a) { return a.size[2] + 2 * kMargin; }

  Gather(const Arguments& a)
      : a_(a), columns_(a.size[2], a.coarse[2]), z_(a.size[0], a.coarse[0]), y_(a.size[1], a.coarse[1]), x_(a.size[2], a.coarse[2]),
        add_(add_for(a.out.type)) {}
  bool ok() const { return columns_.ok() && z_.ok() && y_.ok() && x_.ok(); }
  bool knows_type() const { return add_; }

  // out (w) = scale · Σ weight · gradient over the voxels that the row reached. `memory` is zero in its margins, and stays so.
  void row(const Channel& k, int64_t z, int64_t y, float* memory, float* __restrict out) const {
    const int64_t width = a_.size[2], w = a_.coarse[2];
    float* __restrict fine = memory + kMargin;
    std::memset(fine, 0, sizeof(float) * size_t(width));
    int64_t offsets[4];
    float weights[4];
    int held = 0;
    for (int64_t i = 0; i < z_.count(z); ++i)
      for (int64_t j = 0; j < y_.count(y); ++j) {
        offsets[held] = offset_of(a_.out, k.n, k.c, z_.first.data[z] + i, y_.first.data[y] + j);
        weights[held] = z_.weight.data[z_.start.data[z] + i] * y_.weight.data[y_.start.data[y] + j];
        if (++held == 4) add_(a_.out, offsets, weights, held, width, fine), held = 0;
      }
    add_(a_.out, offsets, weights, held, width, fine);
    switch (columns_.ratio) {
      case 1: std::memcpy(out, fine, sizeof(float) * size_t(w)); break;
      case 2: fold<2>(fine, w, out); break;
      case 4: fold<4>(fine, w, out); break;
      case 8: fold<8>(fine, w, out); break;
      default:
        for (int64_t x = 0; x < w; ++x) {
          float sum = 0;
          for (int64_t i = 0; i < x_.count(x); ++i) sum += x_.weight.data[x_.start.data[x] + i] * fine[x_.first.data[x] + i];
          out[x] = sum;
        }
    }
    const float scale = scale_of(a_, k.n, k.c);
    for (int64_t x = 0; x < w; ++x) out[x] *= scale;
  }

 private:
  const Arguments& a_;
  const Columns columns_;
  const Reach z_, y_, x_;
  const AddRows add_;
};

struct Sums {
  double gradient, product;  // Σ g and Σ g · f̂
  void add(const Sums& other) { gradient += other.gradient, product += other.product; }
};

DGF_NOINLINE Sums sums_of(const float* __restrict g, const float* __restrict f, float scale, float shift, float gain, int64_t n) {
  float sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
  for (int64_t i = 0; i < n; ++i) {
    sum += scale * g[i];
    product += scale * g[i] * normalized(f[i], shift, gain);
  }
  return {sum, product};
}

// Through (f - mean) · gain: gain · (g - mean(g) - f̂ · mean(g · f̂)).
void instance_norm_gradient(const float* g, const float* __restrict f, float scale, float shift, float gain, float mean, float product,
                            int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = norm_gradient(scale * g[i], normalized(f[i], shift, gain), gain, mean, product);
}

// Gradient to the features, in two rounds where the normalization needs sums of the first: gathered, then finished. What is
// gathered waits in the result where that is float, else in scratch memory; with equal grids it is read again instead.
struct FeatureGradient {
  const Arguments& a;
  const Kept& kept;
  const Gather gather;
  const LoadRow load, load_grad;
  const StoreRow store;
  const int64_t height, width, voxels;
  const Blocks blocks;
  const Tasks tasks;
  const bool instance, per_voxel, same;
  Scratch<Sums> sums;  // (kept channels of the features, blocks)
  Scratch<float> scratch;

  FeatureGradient(const Arguments& a_, const Kept& kept_)
      : a(a_), kept(kept_), gather(a), load(load_for(a.features.type)), load_grad(load_for(a.out.type)),
        store(store_for(a.grad_features.type)), height(a.coarse[1]), width(a.coarse[2]), voxels(a.coarse[0] * height * width),
        blocks(a.coarse[0], plane_of(a.out, a.out_channels, height * width)),
        tasks{kept, kept.images, kept.count, blocks.count, a.out.strides[4] != 1}, instance(a.feature_norm == kInstance),
        per_voxel(::per_voxel(a)), same(same_grid(a) && !per_voxel), sums(tasks.count()),
        scratch(in_place() ? 0 : per_voxel ? a.batch * a.feature_channels * voxels : instance && !same ? (kept.count - kept.images) * voxels : 0) {}

  bool in_place() const { return a.grad_features.type == kFloat32; }
  bool ok() const { return gather.ok() && sums.data && scratch.data; }
  bool knows_types() const { return load && load_grad && store && gather.knows_type(); }
  int64_t memory() const { return Gather::memory(a) + (per_voxel ? (a.feature_channels + 2) * width : width); }

  int64_t row_of(const Channel& k) const { return k.n * a.feature_channels + k.c - a.image_channels; }
  float* gathered(const Tasks::Task& t) const {
    const int64_t index = in_place() || per_voxel ? row_of(tasks.channel(t)) : t.index;
    return (in_place() ? at<float>(a.grad_features, 0) : scratch.data) + index * voxels;
  }

  // Equal grids: visit(piece of the gradient, piece of the features, length, where it lies in the channel).
  template <class Visit>
  void each_pair(const Tasks::Task& t, Visit visit) const {
    float gradient[kPiece], feature[kPiece];
    const Channel& k = tasks.channel(t);
    const Runs runs(height, width, joined(a.out, width) && joined(a.features, width));
    int64_t place = blocks.begin(t.block) * height * width;
    for (int64_t z = blocks.begin(t.block); z < blocks.end(t.block); ++z)
      for (int64_t r = 0; r < runs.count; ++r)
        for (int64_t start = 0; start < runs.length; start += kPiece) {
          const int64_t n = least(kPiece, runs.length - start);
          const float* g = floats(a.out, load_grad, offset_of(a.out, k.n, k.c, z, r) + start * a.out.strides[4], n, gradient);
          const float* f = nullptr;
          if (instance)
            f = floats(a.features, load, offset_of(a.features, k.n, k.c - a.image_channels, z, r) + start * a.features.strides[4], n, feature);
          visit(g, f, n, place);
          place += n;
        }
  }

  void gather_task(int64_t i, float* memory) const {
    const Tasks::Task t = tasks.at(i);
    const Channel& k = tasks.channel(t);
    const float scale = scale_of(a, k.n, k.c), *stats = a.feature_stats + 2 * row_of(k);
    Sums total{0, 0};
    if (same) {
      float out[kPiece];
      each_pair(t, [&](const float* g, const float* f, int64_t n, int64_t place) {
        if (instance) return total.add(sums_of(g, f, scale, stats[0], stats[1], n));
        for (int64_t j = 0; j < n; ++j) out[j] = scale * g[j];
        store(out, a.grad_features.data, row_of(k) * voxels + place, 1, n);
      });
    } else {
      float* feature = memory + Gather::memory(a);
      for (int64_t z = blocks.begin(t.block); z < blocks.end(t.block); ++z)
        for (int64_t y = 0; y < height; ++y) {
          const int64_t place = (z * height + y) * width;
          const bool final = !instance && !per_voxel && !in_place();
          float* row = final ? feature : gathered(t) + place;
          gather.row(k, z, y, memory, row);
          if (final) store(row, a.grad_features.data, row_of(k) * voxels + place, 1, width);
          if (instance)
            total.add(sums_of(row, floats(a.features, load, offset_of(a.features, k.n, k.c - a.image_channels, z, y), width, feature), 1.0f,
                              stats[0], stats[1], width));
        }
    }
    sums.data[tasks.slot(t)] = total;
  }

  void instance_task(int64_t i, float* memory) const {
    const Tasks::Task t = tasks.at(i);
    const Channel& k = tasks.channel(t);
    const float scale = scale_of(a, k.n, k.c), *stats = a.feature_stats + 2 * row_of(k);
    Sums total{0, 0};
    for (int64_t block = 0; block < blocks.count; ++block) total.add(sums.data[tasks.slot({t.index, block})]);
    const float mean = float(total.gradient / double(voxels)), product = float(total.product / double(voxels));
    if (same) {
      float out[kPiece];
      each_pair(t, [&](const float* g, const float* f, int64_t n, int64_t place) {
        float* to = in_place() ? gathered(t) + place : out;
        instance_norm_gradient(g, f, scale, stats[0], stats[1], mean, product, n, to);
        if (!in_place()) store(to, a.grad_features.data, row_of(k) * voxels + place, 1, n);
      });
      return;
    }
    for (int64_t z = blocks.begin(t.block); z < blocks.end(t.block); ++z)
      for (int64_t y = 0; y < height; ++y) {
        const int64_t place = (z * height + y) * width;
        float* row = gathered(t) + place;
        const float* f = floats(a.features, load, offset_of(a.features, k.n, k.c - a.image_channels, z, y), width, memory);
        instance_norm_gradient(row, f, 1.0f, stats[0], stats[1], mean, product, width, row);
        if (!in_place()) store(row, a.grad_features.data, row_of(k) * voxels + place, 1, width);
      }
  }

  // "unit", "standard": a coarse row of all channels of a sample. A norm of eps or less was held at eps.
  void voxel_task(int64_t task, float* memory) const {
    const int64_t rows = a.coarse[0] * height, n = task / rows, row = task % rows, count = a.feature_channels;
    if (!any_kept(a, n, a.image_channels, a.image_channels + count)) return;
    const float* __restrict shift = a.feature_stats + 2 * n * voxels + row * width;
    const float* __restrict gain = shift + voxels;
    float* gradients = (in_place() ? at<float>(a.grad_features, 0) : scratch.data) + n * count * voxels + row * width;
    float *__restrict mean = memory + count * width, *__restrict product = mean + width;
    for (int64_t x = 0; x < width; ++x) mean[x] = product[x] = 0.0f;
    for (int64_t c = 0; c < count; ++c) {
      float* __restrict f = memory + c * width;
      const float* __restrict g = gradients + c * voxels;
      load(a.features.data, offset_of(a.features, n, c, row / height, row % height), a.features.strides[4], width, f);
      for (int64_t x = 0; x < width; ++x) {
        f[x] = normalized(f[x], shift[x], gain[x]);
        mean[x] += g[x];
        product[x] += g[x] * f[x];
      }
    }
    for (int64_t x = 0; x < width; ++x) voxel_gradient_means(a.feature_norm, gain[x], float(count), a.eps, mean + x, product + x);
    for (int64_t c = 0; c < count; ++c) {
      const float* __restrict f = memory + c * width;
      float* __restrict g = gradients + c * voxels;
      for (int64_t x = 0; x < width; ++x) g[x] = norm_gradient(g[x], f[x], gain[x], mean[x], product[x]);
      if (!in_place()) store(g, a.grad_features.data, (n * count + c) * voxels + row * width, 1, width);
    }
  }
};

int features_backward(const Arguments& a, const Kept& kept) {
  const FeatureGradient gradient(a, kept);
  if (!gradient.knows_types()) return kBadType;
  if (!gradient.ok()) return kNoMemory;
  const int64_t channels = a.batch * a.feature_channels, size = element_size(a.grad_features.type);
  bool out_of_memory = false;
#pragma omp parallel num_threads(team(a, channels * gradient.voxels + kept.count * a.size[0] * a.size[1] * a.size[2]))
  {
    Scratch<float> memory(gradient.memory());
    if (memory.data)
      std::memset(memory.data, 0, sizeof(float) * size_t(gradient.memory()));
    else
#pragma omp atomic write
      out_of_memory = true;
    // What was dropped: no gradient, unless the norm spans channels, for which its zeros are gathered too.
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < channels; ++i) {
      if (scale_of(a, i / a.feature_channels, a.image_channels + i % a.feature_channels) != 0.0f) continue;
      clear(static_cast<char*>(a.grad_features.data) + i * gradient.voxels * size, gradient.voxels * size, channels * gradient.voxels * size);
      if (gradient.per_voxel && !gradient.in_place())
        std::memset(gradient.scratch.data + i * gradient.voxels, 0, sizeof(float) * size_t(gradient.voxels));
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < gradient.tasks.count(); ++i)
      if (memory.data) gradient.gather_task(i, memory.data);
    if (gradient.instance) {
#pragma omp for schedule(dynamic)
      for (int64_t i = gradient.tasks.count() - 1; i >= 0; --i)
        if (memory.data) gradient.instance_task(i, memory.data + Gather::memory(a));
    } else if (gradient.per_voxel) {
#pragma omp for schedule(dynamic, 8)
      for (int64_t i = 0; i < a.batch * a.coarse[0] * a.coarse[1]; ++i)
        if (memory.data) gradient.voxel_task(i, memory.data + Gather::memory(a));
    }
  }
  return out_of_memory ? kNoMemory : kOk;
}

// scale · gain · gradient; zero where a window clipped.
int image_backward(const Arguments& a) {
  const int64_t height = a.size[1], width = a.size[2];
  const bool window = a.image_norm == kWindow;
  const AffineRun affine = affine_for(a.out.type, a.grad_image.type);
  const LoadRow load_grad = load_for(a.out.type), load_image = window ? load_for(a.image.type) : nullptr;
  const StoreRow store = store_for(a.grad_image.type);
  if (!affine || !store || (window && !load_image)) return kBadType;
  const Blocks blocks(a.size[0], height * width);
  const bool one = joined(a.out, width) && !window;
  bool out_of_memory = false;
#pragma omp parallel num_threads(team(a, a.batch * a.image_channels * a.size[0] * height * width))
  {
    Scratch<float> grads(width), values(width);
    if (!grads.data || !values.data)
#pragma omp atomic write
      out_of_memory = true;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < a.batch * a.image_channels * blocks.count; ++task) {
      const int64_t channel = task / blocks.count, n = channel / a.image_channels, c = channel % a.image_channels;
      const int64_t begin = blocks.begin(task % blocks.count), end = blocks.end(task % blocks.count);
      const float gain = a.image_stats[2 * n + 1] * scale_of(a, n, c);
      if (scale_of(a, n, c) == 0.0f) {
        const int64_t size = element_size(a.grad_image.type);
        clear(static_cast<char*>(a.grad_image.data) + offset_of(a.grad_image, n, c, begin, 0) * size,
              (end - begin) * height * width * size, a.batch * a.image_channels * a.size[0] * height * width * size);
        continue;
      }
      for (int64_t z = begin; z < end; ++z)
        for (int64_t y = 0; y < (one ? 1 : height); ++y) {
          const int64_t from = offset_of(a.out, n, c, z, y), to = offset_of(a.grad_image, n, c, z, y);
          if (!window) {
            affine(a.out, from, 0.0f, gain, nullptr, one ? height * width : width, a.grad_image, to);
          } else if (grads.data && values.data) {
            float *__restrict g = grads.data, *__restrict v = values.data;
            load_grad(a.out.data, from, a.out.strides[4], width, g);
            load_image(a.image.data, offset_of(a.image, n, c, z, y), a.image.strides[4], width, v);
            for (int64_t x = 0; x < width; ++x) g[x] = image_gradient(g[x], gain, true, v[x], a.norm_a, a.norm_b);
            store(g, a.grad_image.data, to, 1, width);
          }
        }
    }
  }
  return out_of_memory ? kNoMemory : kOk;
}

int backward(const Arguments& a) {
  if (a.grad_image.data)
    if (const int status = image_backward(a)) return status;
  if (!a.grad_features.data) return kOk;
  const Kept kept(a);
  return kept.channels.data ? features_backward(a, kept) : kNoMemory;
}

}  // namespace
