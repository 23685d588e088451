// warp on the CPU: out[o] = in[A·(o + u(o)) + t], linear for the image, nearest for the label.
//
// The unit of work is a block of output planes, cut by sizes only: threads do not change a bit. A block is walked in runs of at
// most kRun voxels along x. For a run, addresses and weights are computed once, in vectors; then, for every channel, the voxels
// around each source are copied side by side, one by one, as pairs of neighbours along x: a load brings two. The pairs are
// weighed in vectors.
//
// Coordinates of a run are float, counted from a whole voxel near the source of its middle, which is found in double: they are
// small, so their error is too, whatever the volume.
//
// A sample whose map takes voxels to voxels (identity, flips, quarter turns, whole shifts) is copied.
#include "native.h"

namespace {

enum Status { kOk = 0, kNoMemory = 1, kBadType = 2, kOtherVersion = 3 };

constexpr int64_t kRun = 128;                // voxels along x whose addresses and weights are computed at a time
constexpr int64_t kBlockElements = 1 << 16;  // of a block of planes
constexpr int64_t kSerial = 1 << 14;         // voxels below which threads cost more than they save
constexpr double kFar = double(1 << 20);     // voxels: no run counts from a voxel further away

struct Volume {
  int64_t size[3], stride[3];  // D, H, W; the stride is 0 where there is no next voxel
  int64_t voxels;
  explicit Volume(const int64_t* shape) : voxels(shape[0] * shape[1] * shape[2]) {
    const int64_t steps[3] = {shape[1] * shape[2], shape[2], 1};
    for (int i = 0; i < 3; ++i) size[i] = shape[i], stride[i] = shape[i] > 1 ? steps[i] : 0;
  }
};

// ---- maps that take voxels to voxels ---------------------------------------------------------------------------------

// source axis i = sign[i] · output axis from[i] + shift[i].
struct Lattice {
  int from[3];
  int64_t sign[3], shift[3];
};

bool lattice_of(const float* matrix, const Volume& v, bool border, Lattice* lattice) {
  int taken = 0;
  for (int i = 0; i < 3; ++i) {
    const float *row = matrix + 4 * i, t = row[3];
    int found = 0;
    for (int j = 0; j < 3; ++j)
      if (row[j] != 0) {
        if (row[j] != 1 && row[j] != -1) return false;
        lattice->from[i] = j, lattice->sign[i] = row[j] > 0 ? 1 : -1;
        taken |= 1 << j;
        ++found;
      }
    if (found != 1 || !(t >= -1e6f && t <= 1e6f) || t != float(int64_t(t))) return false;
    lattice->shift[i] = int64_t(t);
    const int64_t last = lattice->sign[i] * (v.size[lattice->from[i]] - 1) + lattice->shift[i];
    const bool within = lattice->shift[i] >= 0 && lattice->shift[i] < v.size[i] && last >= 0 && last < v.size[i];
    if (border && !within) return false;
  }
  return taken == 7;
}

template <class T>
void copy_row(const T* __restrict in, int64_t step, int64_t n, T* __restrict out) {
  if (step == 1)
    std::memcpy(out, in, size_t(n) * sizeof(T));
  else if (step == -1)
    for (int64_t x = 0; x < n; ++x) out[x] = in[-x];
  else
    for (int64_t x = 0; x < n; ++x) out[x] = in[x * step];
}

// Planes [begin, end) of one channel.
template <class T>
void copy_planes(const void* from, const Lattice& lattice, const Volume& v, int64_t begin, int64_t end, void* to) {
  const T* in = static_cast<const T*>(from);
  T* out = static_cast<T*>(to);
  const int64_t width = v.size[2];
  for (int64_t z = begin; z < end; ++z)
    for (int64_t y = 0; y < v.size[1]; ++y) {
      const int64_t at[3] = {z, y, 0};
      int64_t offset = 0, step = 0, first = 0, last = width - 1;
      for (int i = 0; i < 3; ++i) {
        const int64_t start = lattice.sign[i] * at[lattice.from[i]] + lattice.shift[i];
        offset += start * v.stride[i];
        if (lattice.from[i] != 2) {
          if (start < 0 || start >= v.size[i]) last = -1;
          continue;
        }
        step = lattice.sign[i] * v.stride[i];
        const int64_t a = lattice.sign[i] > 0 ? -start : start - v.size[i] + 1;  // the voxels x whose source is inside
        const int64_t b = lattice.sign[i] > 0 ? v.size[i] - 1 - start : start;
        first = a > first ? a : first, last = b < last ? b : last;
      }
      T* row = out + (z * v.size[1] + y) * width;
      if (last < first) {
        std::memset(row, 0, size_t(width) * sizeof(T));
        continue;
      }
      if (first > 0) std::memset(row, 0, size_t(first) * sizeof(T));
      copy_row(in + offset + first * step, step, last - first + 1, row + first);
      if (last + 1 < width) std::memset(row + last + 1, 0, size_t(width - 1 - last) * sizeof(T));
    }
}

// ---- displacement ----------------------------------------------------------------------------------------------------

// The two coarse voxels that a voxel lies between, and the weight of the upper one.
struct Tap {
  int64_t lo, hi;
  float weight;
};

// Half-pixel centres, edges clamped: source = (i + 1/2) · coarse / size - 1/2. In integers, so that it is exact.
Tap tap(int64_t i, int64_t size, int64_t coarse) {
  int64_t numerator = (2 * i + 1) * coarse - size;  // source · 2 · size
  if (numerator < 0) numerator = 0;
  const int64_t lo = numerator / (2 * size), rest = numerator - lo * 2 * size;
  const int64_t hi = rest && lo + 1 < coarse ? lo + 1 : lo;  // what has no weight is not read
  return {lo, hi, float(rest) / float(2 * size)};
}

// The displacement of one sample, turned by A: first of one output plane on rows of the coarse grid, then of any of its rows.
struct Displacement {
  const float *field, *matrix;  // of the sample; null where there is none
  const int64_t *coarse, *size;
  Scratch<float> line, plane;  // (3, w) and (3, h, W)
  Scratch<int32_t> lo, hi;
  Scratch<float> weight;

  Displacement(const WarpArguments& a, bool any)
      : field(nullptr), matrix(nullptr), coarse(a.coarse), size(a.size), line(any ? 3 * a.coarse[2] : 0),
        plane(any ? 3 * a.coarse[1] * a.size[2] : 0), lo(any ? a.size[2] : 0), hi(any ? a.size[2] : 0),
        weight(any ? a.size[2] : 0) {
    for (int64_t x = 0; any && ok() && x < size[2]; ++x) {
      const Tap t = tap(x, size[2], coarse[2]);
      lo.data[x] = int32_t(t.lo), hi.data[x] = int32_t(t.hi), weight.data[x] = t.weight;
    }
  }
  bool ok() const { return line.data && plane.data && lo.data && hi.data && weight.data; }

  void to_plane(int64_t z) {
    const int64_t rows = coarse[1], w = coarse[2], width = size[2], component = coarse[0] * rows * w;
    const Tap t = tap(z, size[0], coarse[0]);
    for (int64_t y = 0; y < rows; ++y) {
      const float *below = field + (t.lo * rows + y) * w, *above = field + (t.hi * rows + y) * w;
      for (int i = 0; i < 3; ++i) {
        float* __restrict out = w == width ? plane.data + (i * rows + y) * width : line.data + i * w;
        const float a = matrix[4 * i], b = matrix[4 * i + 1], c = matrix[4 * i + 2];
        for (int64_t x = 0; x < w; ++x) {
          const float *p = below + x, *q = above + x;
          const float uz = p[0] + t.weight * (q[0] - p[0]);
          const float uy = p[component] + t.weight * (q[component] - p[component]);
          const float ux = p[2 * component] + t.weight * (q[2 * component] - p[2 * component]);
          out[x] = a * uz + b * uy + c * ux;
        }
        if (w != width) stretch(line.data + i * w, plane.data + (i * rows + y) * width);
      }
    }
  }
  void stretch(const float* __restrict row, float* __restrict out) const {
    const int32_t *__restrict l = lo.data, *__restrict h = hi.data;
    const float* __restrict g = weight.data;
    for (int64_t x = 0; x < size[2]; ++x) out[x] = row[l[x]] + g[x] * (row[h[x]] - row[l[x]]);
  }
  // Voxels [x, x + n) of component i in the row between two coarse ones.
  void row(int i, const Tap& t, int64_t x, int64_t n, float* __restrict out) const {
    const float* __restrict p = plane.data + (i * coarse[1] + t.lo) * size[2] + x;
    const float* __restrict q = plane.data + (i * coarse[1] + t.hi) * size[2] + x;
    for (int64_t k = 0; k < n; ++k) out[k] = p[k] + t.weight * (q[k] - p[k]);
  }
};

// ---- gather ----------------------------------------------------------------------------------------------------------

// Where a run of voxels reads. An image's voxel reads two voxels along each axis, always inside, at the weights of the tent
// max(0, 1 - |s - voxel|): what is outside has no weight.
struct Run {
  alignas(kLine) int32_t base[kRun];         // of the image: the lower voxel along each axis
  alignas(kLine) int32_t nearest[kRun];      // of the label
  alignas(kLine) int32_t inside[kRun];       // of the label: all ones, or 0 outside
  alignas(kLine) float weights[3][2][kRun];  // of the lower and the upper voxel along z, y, x
  alignas(kLine) float shift[3][kRun];       // A·u
  int32_t image_reads, label_reads;          // 0 where no voxel does
};

// One axis of a run: its sources are rest + (k - kRun / 2) · step (+ shift), counted from voxel `whole`.
struct Axis {
  float rest, step, lowest, greatest, upper;  // upper: 1, or 0 where the axis has one voxel
  int32_t whole, last, highest;               // the last voxel, and the last that is the lower of two

  Axis(const float* row, int64_t z, int64_t y, int64_t x, int64_t size, bool border) {
    const double middle = double(row[0]) * double(z) + double(row[1]) * double(y) + double(row[2]) * double(x + kRun / 2) +
                          double(row[3]);  // finite, as the matrix is
    const double origin = double(int64_t(middle > kFar ? kFar : middle < -kFar ? -kFar : middle)), beyond = border ? 0.0 : 2.0;
    rest = float(middle - origin), step = row[2];
    lowest = float(-beyond - origin), greatest = float(double(size - 1) + beyond - origin);
    whole = int32_t(origin), last = int32_t(size) - 1, highest = last > 0 ? last - 1 : 0;
    upper = last > 0 ? 1.0f : 0.0f;
  }
};

struct Place {
  int32_t low, nearest, inside;
  float lower, upper;  // weights
};

inline Place place(const Axis& a, float s) {
  s = s > a.lowest ? s : a.lowest;  // NaN becomes the lowest
  s = s < a.greatest ? s : a.greatest;
  int32_t below = int32_t(s);
  below -= float(below) > s;
  int32_t nearest = below + (s - float(below) >= 0.5f) + a.whole;
  const int32_t inside = -int32_t((nearest >= 0) & (nearest <= a.last));
  nearest = nearest > 0 ? nearest : 0;
  nearest = nearest < a.last ? nearest : a.last;
  int32_t low = below + a.whole;
  low = low > 0 ? low : 0;
  low = low < a.highest ? low : a.highest;
  const float q = s - float(low - a.whole), r = q - 1.0f;
  const float lower = 1.0f - (q < 0 ? -q : q), upper = 1.0f - (r < 0 ? -r : r);
  return {low, nearest, inside, lower > 0 ? lower : 0.0f, (upper > 0 ? upper : 0.0f) * a.upper};
}

template <bool Displaced>
void locate(Run& run, const Axis& z, const Axis& y, const Axis& x, const Volume& v, int64_t n) {
  const int32_t height = int32_t(v.size[1]), width = int32_t(v.size[2]);
  int32_t image = 0, label = 0;
#pragma omp simd reduction(| : image, label)
  for (int64_t k = 0; k < n; ++k) {
    const float from_middle = float(int32_t(k - kRun / 2));
    const Place p = place(z, z.rest + from_middle * z.step + (Displaced ? run.shift[0][k] : 0.0f));
    const Place q = place(y, y.rest + from_middle * y.step + (Displaced ? run.shift[1][k] : 0.0f));
    const Place r = place(x, x.rest + from_middle * x.step + (Displaced ? run.shift[2][k] : 0.0f));
    run.weights[0][0][k] = p.lower, run.weights[0][1][k] = p.upper;
    run.weights[1][0][k] = q.lower, run.weights[1][1][k] = q.upper;
    run.weights[2][0][k] = r.lower, run.weights[2][1][k] = r.upper;
    run.base[k] = (p.low * height + q.low) * width + r.low;
    run.nearest[k] = (p.nearest * height + q.nearest) * width + r.nearest;
    run.inside[k] = p.inside & q.inside & r.inside;
    image |= int32_t((p.lower + p.upper > 0) & (q.lower + q.upper > 0) & (r.lower + r.upper > 0));
    label |= run.inside[k];
  }
  run.image_reads = image, run.label_reads = label;
}

// Two neighbours along x.
template <class T>
struct Pair {
  T voxel[2];
};

template <class T>
struct Pairs {
  alignas(kLine) Pair<T> at[4][kRun];  // (z, y), (z, y + 1), (z + 1, y), (z + 1, y + 1)
};

template <class T>
void gather(const T* in, const Run& run, const Volume& v, int64_t n, Pairs<T>& pairs) {
  const T *p[4] = {in, in + v.stride[1], in + v.stride[0], in + v.stride[0] + v.stride[1]};
  if (v.size[2] > 1)
    for (int64_t k = 0; k < n; ++k) {
      const int64_t at = run.base[k];
      for (int j = 0; j < 4; ++j) std::memcpy(&pairs.at[j][k], p[j] + at, sizeof(Pair<T>));
    }
  else
    for (int64_t k = 0; k < n; ++k)
      for (int j = 0; j < 4; ++j) pairs.at[j][k] = {{p[j][run.base[k]], p[j][run.base[k]]}};
}

template <class T>
void weigh(const Pairs<T>& pairs, const Run& run, int64_t n, T* __restrict out) {
  const float(*w)[2][kRun] = run.weights;
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    float x[2];
    for (int i = 0; i < 2; ++i)
      x[i] = w[0][0][k] * (w[1][0][k] * to_float(pairs.at[0][k].voxel[i]) + w[1][1][k] * to_float(pairs.at[1][k].voxel[i])) +
             w[0][1][k] * (w[1][0][k] * to_float(pairs.at[2][k].voxel[i]) + w[1][1][k] * to_float(pairs.at[3][k].voxel[i]));
    from_float(w[2][0][k] * x[0] + w[2][1][k] * x[1], out + k);
  }
}

template <class T>
void pick(const T* in, const Run& run, int64_t n, T* __restrict out) {
  for (int64_t k = 0; k < n; ++k) out[k] = in[run.nearest[k]];
  for (int64_t k = 0; k < n; ++k) out[k] = T(out[k] & T(run.inside[k]));
}

// One sample of a call.
struct Sample {
  const float *matrix, *displacement;  // null where it is zero
  bool copied;
  Lattice lattice;
};

template <class T, class LabelT>
struct Warp {
  const WarpArguments& a;
  const Volume v;
  const Sample* samples;

  // The same planes of every channel.
  void planes(int64_t n, int64_t begin, int64_t end, Displacement& displacement) const {
    const T* in = static_cast<const T*>(a.image) + n * a.channels * v.voxels;
    const LabelT* label = static_cast<const LabelT*>(a.label) + n * a.labels * v.voxels;
    T* out = static_cast<T*>(a.out) + n * a.channels * v.voxels;
    LabelT* label_out = static_cast<LabelT*>(a.label_out) + n * a.labels * v.voxels;
    const Sample& sample = samples[n];
    if (sample.copied) {
      for (int64_t c = 0; c < a.channels; ++c)
        copy_planes<T>(in + c * v.voxels, sample.lattice, v, begin, end, out + c * v.voxels);
      for (int64_t l = 0; l < a.labels; ++l)
        copy_planes<LabelT>(label + l * v.voxels, sample.lattice, v, begin, end, label_out + l * v.voxels);
      return;
    }
    displacement.field = sample.displacement, displacement.matrix = sample.matrix;
    Run run;
    Pairs<T> pairs;
    for (int64_t z = begin; z < end; ++z) {
      if (sample.displacement) displacement.to_plane(z);
      for (int64_t y = 0; y < v.size[1]; ++y)
        for (int64_t x = 0; x < v.size[2]; x += kRun) {
          const int64_t length = least(kRun, v.size[2] - x), at = (z * v.size[1] + y) * v.size[2] + x;
          find(run, sample, displacement, z, y, x, length);
          for (int64_t c = 0; c < a.channels; ++c) {
            T* row = out + c * v.voxels + at;
            if (run.image_reads) {
              gather(in + c * v.voxels, run, v, length, pairs);
              weigh(pairs, run, length, row);
            } else {
              std::memset(row, 0, size_t(length) * sizeof(T));
            }
          }
          for (int64_t l = 0; l < a.labels; ++l) {
            LabelT* row = label_out + l * v.voxels + at;
            if (run.label_reads)
              pick(label + l * v.voxels, run, length, row);
            else
              std::memset(row, 0, size_t(length) * sizeof(LabelT));
          }
        }
    }
  }

  void find(Run& run, const Sample& sample, const Displacement& displacement, int64_t z, int64_t y, int64_t x, int64_t n) const {
    const float* m = sample.matrix;
    const Axis axes[3] = {{m, z, y, x, v.size[0], a.border != 0}, {m + 4, z, y, x, v.size[1], a.border != 0},
                          {m + 8, z, y, x, v.size[2], a.border != 0}};
    if (sample.displacement) {
      const Tap t = tap(y, v.size[1], a.coarse[1]);
      for (int i = 0; i < 3; ++i) displacement.row(i, t, x, n, run.shift[i]);
      locate<true>(run, axes[0], axes[1], axes[2], v, n);
    } else {
      locate<false>(run, axes[0], axes[1], axes[2], v, n);
    }
  }

  int all(bool displaced) const {
    const int64_t plane = v.size[1] * v.size[2], depth = v.size[0];
    const int64_t thickness = plane < kBlockElements ? kBlockElements / plane : 1, blocks = (depth + thickness - 1) / thickness;
    const int team = int(least(a.threads, 1 + a.batch * v.voxels / kSerial));
    int status = kOk;
#pragma omp parallel num_threads(team)
    {
      Displacement displacement(a, displaced);
      if (!displacement.ok()) {
#pragma omp atomic write
        status = kNoMemory;
      }
#pragma omp barrier
      if (status == kOk)
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < a.batch * blocks; ++task) {
          const int64_t begin = task % blocks * thickness;
          planes(task / blocks, begin, least(depth, begin + thickness), displacement);
        }
    }
    return status;
  }
};

bool any_nonzero(const float* values, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (values[i] != 0) return true;  // NaN, too
  return false;
}

template <class T, class LabelT>
int warp_types(const WarpArguments& a) {
  Scratch<Sample> samples(a.batch);
  if (!samples.data) return kNoMemory;
  const Volume v(a.size);
  const int64_t field = 3 * a.coarse[0] * a.coarse[1] * a.coarse[2];
  bool displaced = false;
  for (int64_t n = 0; n < a.batch; ++n) {
    Sample& sample = samples.data[n];
    sample.matrix = a.matrix + n * 12;
    const float* displacement = a.displacement ? a.displacement + n * field : nullptr;
    sample.displacement = displacement && any_nonzero(displacement, field) ? displacement : nullptr;
    sample.copied = !sample.displacement && lattice_of(sample.matrix, v, a.border, &sample.lattice);
    displaced = displaced || sample.displacement;
  }
  return Warp<T, LabelT>{a, v, samples.data}.all(displaced);
}

template <class T>
int warp_label(const WarpArguments& a) {
  switch (a.label_bytes) {
    case 1: return warp_types<T, uint8_t>(a);
    case 2: return warp_types<T, uint16_t>(a);
    case 4: return warp_types<T, uint32_t>(a);
    default: return kBadType;
  }
}

int warp(const WarpArguments& a) {
  using Function = int (*)(const WarpArguments&);
  const Function function = of_float<Function>(a.type, warp_label<float>, warp_label<Half>, warp_label<BFloat16>);
  return function ? function(a) : int(kBadType);
}

}  // namespace

DGF_ENTRY(warp, WarpArguments) { return arguments->bytes == sizeof(WarpArguments) ? warp(*arguments) : kOtherVersion; }
