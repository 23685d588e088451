// mind_ssc on the CPU; kernels/mind_ssc/reference.py is the definition.
//
// Two sweeps over the image: the first takes the mean of the variance over the volume, by which the second holds it. The second
// computes the distances again instead of reading them: that costs fewer cycles than 12 values a voxel cost bytes.
//
// The twelve pairs of neighbours have six differences. The pair (a, b) compares the voxels at o + a and o + b, and so does, at
// another o, the pair (-b, -a), since b - a is the same. For such a difference v, a field,
//
//     E(p) = (I(p) - I(p + v))²,   distance of the pair (a, b) at o = Σ over the box around o of E(q + a),   q clamped to the volume,
//
// serves both. I is the image with its edges repeated. Away from the edges both are the sum S of E over the box, at o + a and at
// o - b; where the box leaves the volume q is clamped before it is shifted, and each of the two has a sum of its own.
//
// The unit of work is a strip of rows through some planes. It is walked plane by plane: of each plane the sums of the fields over
// the box along y go into a ring of planes, and with those before it into a ring of sums along z; both stay in the second cache.
// Then an output row is summed along x and finished in registers. Every value is computed in the same way whatever strip it is in,
// and partial results are those of rows: the number of threads does not change a bit.
#include "native.h"

namespace {

enum Status { kOk = 0, kNoMemory = 1, kBadType = 2, kOtherVersion = 3 };

// Loops stay functions of their own: inlined into a parallel region, GCC does not vectorise them.
#define DGF_NOINLINE __attribute__((noinline))

constexpr int kPairs = 12, kFields = 6;
constexpr int64_t kStripBytes = 384 << 10;     // of a strip's rings
constexpr int64_t kSerial = 1 << 13;           // voxels below which threads cost more than they save
constexpr int64_t kSlack = 2 * kVectorFloats;  // floats after a row, for vectors that reach beyond its end
constexpr int64_t kPiece = 1024;                // voxels whose sums are taken in float before they are combined in double
constexpr float kFloor = 1e-9f;                // of the variance

// A pair of neighbours: its field, and the shift `a` at which it reads it. A field: v.
struct Pair {
  int field;
  int64_t shift[3];
};
struct Field {
  int64_t v[3];
  int64_t first(int axis) const { return v[axis] > 0 ? -v[axis] : 0; }  // where a row along the axis starts
};

// In the order of PAIRS of reference.py: by the first neighbour, z-, z+, y-, y+, then by the second.
struct Plan {
  Pair pairs[kPairs];
  Field fields[kFields];
  explicit Plan(int64_t dilation) {
    int k = 0;
    for (int i = 0; i < 2; ++i)
      for (int first = -1; first < 2; first += 2)
        for (int j = i + 1; j < 3; ++j)
          for (int second = -1; second < 2; second += 2) {
            // Seen from the neighbour on the positive side of axis i the other one is at -1 along i and `step` along j; a pair
            // with a neighbour on its negative side is seen from the other one.
            const int step = first > 0 ? second : -second, field = 2 * (i + j - 1) + (step > 0);
            Pair& pair = pairs[k++];
            pair = {field, {0, 0, 0}};
            pair.shift[first > 0 ? i : j] = first > 0 ? dilation : second * dilation;
            fields[field] = {{0, 0, 0}};
            fields[field].v[i] = -dilation, fields[field].v[j] = step * dilation;
          }
  }
};

inline int64_t clamped(int64_t i, int64_t n) { return i < 0 ? 0 : i < n ? i : n - 1; }

// ---- loops -----------------------------------------------------------------------------------------------------------

// Rows have room for whole vectors, and loops take no others.

// to (+)= (a - b)²
template <bool kFirst>
DGF_NOINLINE void square(const float* a, const float* b, int64_t n, float* __restrict to) {
  for (int64_t x = 0; x < n; x += kVectorFloats) {
    const Floats difference = load_floats(a + x) - load_floats(b + x), squared = difference * difference;
    store_floats(kFirst ? squared : load_floats(to + x) + squared, to + x);
  }
}

template <bool kFirst>
DGF_NOINLINE void add(const float* a, int64_t n, float* __restrict to) {
  for (int64_t x = 0; x < n; x += kVectorFloats)
    store_floats(kFirst ? load_floats(a + x) : load_floats(to + x) + load_floats(a + x), to + x);
}

// A plane of all fields for boxes of three voxels, summed along y, in one walk down each column of vectors.
struct Walk {
  const float *near, *far;  // the image at the first row of E, and `dilation` planes before
  int64_t image_pitch, dilation, width;
  int64_t rows;                // of the plane; one more is written where they are odd
  float* plane;                // of the first field
  const float *before, *last;  // the two before it, or null
  float* sum;                  // of the three
  int64_t pitch, field;        // floats from row to row, and from field to field
};

inline void differences(const float* near, const float* far, int64_t down, int64_t d, Floats* out) {
  const Floats here = load_floats(near);
  const Floats there[kFields] = {load_floats(far - down), load_floats(far + down), load_floats(far - d),
                                 load_floats(far + d), load_floats(near - down - d), load_floats(near - down + d)};
#pragma GCC unroll 6
  for (int f = 0; f < kFields; ++f) out[f] = here - there[f];
}

template <bool kSum>
DGF_NOINLINE void walk(const Walk& w) {
  const int64_t image_pitch = w.image_pitch, d = w.dilation, down = d * image_pitch, pitch = w.pitch, field = w.field, rows = w.rows;
  float *const plane = w.plane, *const sum = w.sum;
  const float *const before = w.before, *const last = w.last;
  const auto put = [=](int64_t at, Floats value) {
    if (kSum) store_floats(load_floats(before + at) + load_floats(last + at) + value, sum + at);
    store_floats(value, plane + at);
  };
  for (int64_t x = 0; x < w.width; x += kVectorFloats) {
    const float *near = w.near + x, *far = w.far + x;
    Floats a[kFields], b[kFields], c[kFields], e[kFields];  // of four rows: two sums, which share two squares
    differences(near, far, down, d, a);
    differences(near + image_pitch, far + image_pitch, down, d, b);
    for (int64_t row = 0, start = x; row < rows; row += 2, start += 2 * pitch) {
      near += 2 * image_pitch, far += 2 * image_pitch;
      differences(near, far, down, d, c);
      differences(near + image_pitch, far + image_pitch, down, d, e);
      int64_t at = start;
#pragma GCC unroll 6
      for (int f = 0; f < kFields; ++f, at += field) {
        const Floats shared = b[f] * b[f] + c[f] * c[f];
        put(at, shared + a[f] * a[f]);
        put(at + pitch, shared + e[f] * e[f]);
        a[f] = c[f], b[f] = e[f];
      }
    }
  }
}

// What the variance is held within, in sums over the box instead of means.
struct Limits {
  float lower, upper, floor;
};

// Whether a vector is the first of its row, and whether it is the last.
template <bool kFirst, bool kLast>
struct Place {
  static constexpr bool first = kFirst, last = kLast;
};

// Calls step(place, x) for each vector of a row of n.
template <class Step>
inline void each_vector(int64_t n, Step step) {
  if (n <= kVectorFloats) {
    step(Place<true, true>(), 0);
    return;
  }
  step(Place<true, false>(), 0);
  int64_t x = kVectorFloats;
  for (; x + kVectorFloats < n; x += kVectorFloats) step(Place<false, false>(), x);
  step(Place<false, true>(), x);
}

// Where the neighbours of a vector's voxels are, one to the left and one to the right, if there are no others: ends repeat.
struct Ends {
  Ints left, right;
  explicit Ends(int64_t n) {  // of a row of n
    const int32_t last = int32_t((n - 1) % kVectorFloats);
    for (int32_t i = 0; i < kVectorFloats; ++i) left[i] = i ? i - 1 : 0, right[i] = i < last ? i + 1 : last;
  }
};

// Sums along x over the box: of three voxels in a row that ends where the volume does, or of `taps` in one that has its ends
// repeated, and starts with what is left of the first voxel.
template <bool kThree, class Where>
inline Floats along_x(Where, const float* row, int64_t taps, const Ends& ends) {
  Floats sum = load_floats(row);
  if (kThree) {
    const Floats left = Where::first ? __builtin_shuffle(sum, ends.left) : load_floats(row - 1);
    const Floats right = Where::last ? __builtin_shuffle(sum, ends.right) : load_floats(row + 1);
    return sum + left + right;
  }
  for (int64_t i = 1; i < taps; ++i) sum += load_floats(row + i);
  return sum;
}

template <class Function>
inline Floats tree(const Floats* values, Function both) {  // of the pairs' values: shorter than a chain
  Floats v[kPairs / 2];
#pragma GCC unroll 6
  for (int k = 0; k < kPairs / 2; ++k) v[k] = both(values[k], values[k + kPairs / 2]);
  return both(both(both(v[0], v[1]), both(v[2], v[3])), both(v[4], v[5]));
}
inline Floats least_of(const Floats* values) {
  return tree(values, [](Floats a, Floats b) { return a < b ? a : b; });
}
inline Floats sum_of(const Floats* values) {
  return tree(values, [](Floats a, Floats b) { return a + b; });
}

// The distances of a vector of voxels at x, from the rows of their sums along y and z.
template <bool kThree, class Where>
inline void distances_of(Where where, const float* const* rows, int64_t x, int64_t taps, const Ends& ends, Floats* distances) {
#pragma GCC unroll 12
  for (int k = 0; k < kPairs; ++k) distances[k] = along_x<kThree>(where, rows[k] + x, taps, ends);
}

// Σ over the voxels of a row and the pairs of distance - least.
template <bool kThree>
DGF_NOINLINE double variance_of(const float* const* rows, int64_t n, int64_t taps, float* __restrict scratch) {
  const Ends ends(n);
  each_vector(n, [&](auto where, int64_t x) {
    Floats distances[kPairs];
    distances_of<kThree>(where, rows, x, taps, ends, distances);
    store_floats(sum_of(distances) - float(kPairs) * least_of(distances), scratch + x);
  });
  double sum = 0;
  for (int64_t x = 0; x < n; x += kPiece) {
    const int64_t end = least(n, x + kPiece);
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = x; i < end; ++i) part += scratch[i];
    sum += double(part);
  }
  return sum;
}

// The descriptors of a row: out (12, pitch).
template <bool kThree>
DGF_NOINLINE void descriptors_of(const float* const* rows, int64_t n, int64_t taps, const Limits& limits, float* out, int64_t pitch) {
  const Ends ends(n);
  const Floats lower = Floats{} + limits.lower, upper = Floats{} + limits.upper, floor = Floats{} + limits.floor;
  each_vector(n, [&](auto where, int64_t x) {
    Floats above[kPairs];  // distance - least
    distances_of<kThree>(where, rows, x, taps, ends, above);
    const Floats least = least_of(above);
#pragma GCC unroll 12
    for (int k = 0; k < kPairs; ++k) above[k] -= least;
    Floats variance = sum_of(above) * (1.0f / kPairs);
    variance = variance > lower ? variance : lower;  // limits that are no numbers stay in either
    variance = variance < upper ? variance : upper;
    const Floats rate = -1.44269504f / (variance + floor);  // to powers of 2
    if (decltype(where)::last && n - x < kVectorFloats) {
      for (int k = 0; k < kPairs; ++k) {
        const Floats value = exp2_of_negative(above[k] * rate);
        std::memcpy(out + k * pitch + x, &value, size_t(n - x) * sizeof(float));
      }
      return;
    }
#pragma GCC unroll 12
    for (int k = 0; k < kPairs; ++k) store_floats(exp2_of_negative(above[k] * rate), out + k * pitch + x);
  });
}

// ---- a strip ---------------------------------------------------------------------------------------------------------

// Sizes of a call's strips and of their rings.
struct Cut {
  int64_t rows, planes;  // of a strip
  int64_t per_plane, per_sample;
  int64_t ring, sums;           // planes that are kept: of sums along y, and of sums along z
  int64_t image_pitch, pitch;   // floats from row to row
  Cut(const MindSscArguments& a)
      : ring(2 * a.radius + a.dilation + 1), sums(a.radius == 1 ? a.dilation + 1 : 0), image_pitch(whole_lines(a.size[2] + 4 * a.dilation + kSlack)),
        pitch(whole_lines(a.size[2] + 2 * a.dilation + kSlack)) {
    const int64_t height = a.size[1], depth = a.size[0], row = kFields * (ring + sums) * pitch * int64_t(sizeof(float));
    rows = kStripBytes / row < 4 ? 4 : kStripBytes / row;
    rows = least(rows, height);
    per_plane = (height + rows - 1) / rows;
    rows = (height + per_plane - 1) / per_plane;
    // A few strips for each thread, but none so short that what surrounds it is most of the work.
    const int64_t wanted = (4 * a.threads + a.batch * per_plane - 1) / (a.batch * per_plane);
    planes = (depth + wanted - 1) / wanted;
    if (planes < 8) planes = least(8, depth);
    per_sample = per_plane * ((depth + planes - 1) / planes);
  }
};

// A strip's memory, and what is done in it.
class Strip {
 public:
  Strip(const MindSscArguments& a, const Plan& plan, const Cut& cut)
      : a_(a), plan_(plan), cut_(cut), load_(load_for(a.image_type)), store_(store_for(a.out_type)), three_(a.radius == 1),
        radius_(a.radius), dilation_(a.dilation), taps_(2 * a.radius + 1), depth_(a.size[0]), height_(a.size[1]), width_(a.size[2]),
        around_(2 * dilation_ + radius_), slots_(cut.rows + 2 * dilation_ + 2 * least(cut.rows, 2 * radius_) + 1),
        image_((dilation_ + 1) * image_rows() * cut.image_pitch), planes_(kFields * (cut.ring + cut.sums) * slots_ * cut.pitch),
        row_(kPairs * row_pitch()), out_(kPairs * row_pitch()),
        slot_(kPairs * cut.rows), sources_(kFields * slots_) {
    if (!ok()) return;
    std::memset(image_.data, 0, size_t((dilation_ + 1) * image_rows() * cut.image_pitch) * sizeof(float));
    std::memset(row_.data, 0, size_t(kPairs * row_pitch()) * sizeof(float));
  }
  bool ok() const {
    return image_.data && planes_.data && row_.data && out_.data && slot_.data && sources_.data;
  }

  // Output planes [z, z_end) of rows [y, y_end) of sample n. With `limits` the result is written, else Σ variance of each row
  // goes to totals (N, D, H).
  void run(int64_t n, int64_t z, int64_t z_end, int64_t y, int64_t y_end, const Limits* limits, double* totals) {
    sample_ = n, y_ = y, y_end_ = y_end;
    find_slots();
    first_ = z < radius_ ? 0 : z - radius_;
    loaded_ = clamped(first_ - dilation_, depth_) - 1;
    for (int64_t made = first_; z < z_end; ++z) {
      for (; made <= least(depth_ - 1, z + radius_) + dilation_; ++made) make_plane(made);
      const bool summed = three_ && z > 0 && z < depth_ - 1;
      for (int64_t row = y; row < y_end; ++row) {
        const float* rows[kPairs];
        if (summed)
          find_rows(z, row, rows);
        else
          sum_rows(z, row, rows);
        if (limits)
          describe(rows, *limits, z, row);
        else
          totals[(n * depth_ + z) * height_ + row] = (three_ ? variance_of<true> : variance_of<false>)(rows, width_, taps_, out_.data);
      }
    }
  }

 private:
  struct Source {
    int64_t y, shift;
  };

  int64_t image_rows() const { return cut_.rows + 2 * around_ + 1; }
  int64_t row_pitch() const { return whole_lines(width_ + 2 * radius_ + kSlack); }

  // Rows of a plane of sums along y. The first rows + 2 · dilation are those around y - dilation, …, y_end - 1 + dilation, whatever
  // they reach; for output rows whose box leaves the volume each pair has one of its own after them. `slot_` says which an output
  // row reads, `sources_` what those that follow are.
  void find_slots() {
    const int64_t rows = y_end_ - y_;
    for (int64_t& count : counts_) count = regular();
    for (int k = 0; k < kPairs; ++k) {
      const Pair& pair = plan_.pairs[k];
      for (int64_t y = y_; y < y_end_; ++y) {
        int64_t slot = y - y_ + pair.shift[1] + dilation_;
        if (y < radius_ || y + radius_ >= height_) {
          slot = counts_[pair.field]++;
          sources_.data[pair.field * slots_ + slot] = {y, pair.shift[1]};
        }
        slot_.data[k * rows + y - y_] = int32_t(slot);
      }
    }
  }
  int64_t regular() const { return y_end_ - y_ + 2 * dilation_; }

  float* image_row(int64_t plane, int64_t y) const {  // at x = 0
    const int64_t at = plane % (dilation_ + 1) * image_rows() + y - y_ + around_;
    return image_.data + at * cut_.image_pitch + 2 * dilation_;
  }
  // At the first slot and x = -dilation.
  float* kept(int f, int64_t i) const { return planes_.data + (f * (cut_.ring + cut_.sums) + i) * slots_ * cut_.pitch; }
  float* plane_of(int f, int64_t p) const { return kept(f, p % cut_.ring); }
  float* sum_of(int f, int64_t p) const { return kept(f, cut_.ring + p % cut_.sums); }

  // The strip's part of a plane of the image, edges repeated.
  void load_plane(int64_t plane) {
    for (int64_t y = y_ - around_; y <= y_end_ + around_; ++y) {
      float* row = image_row(plane, y);
      load_(a_.image, ((sample_ * depth_ + plane) * height_ + clamped(y, height_)) * width_, 1, width_, row);
      for (int64_t x = 1; x <= 2 * dilation_; ++x) row[-x] = row[0], row[width_ - 1 + x] = row[width_ - 1];
    }
  }

  // Of every field the plane p, which may lie up to `dilation` behind the volume, summed over the box along y; and if there are
  // three, the sum of the planes around p - 1.
  void make_plane(int64_t p) {
    while (loaded_ < clamped(p, depth_)) load_plane(++loaded_);
    const int64_t length = width_ + 2 * dilation_, near = clamped(p, depth_), far = clamped(p - dilation_, depth_);
    const bool summed = three_ && p >= first_ + 2;
    if (three_) {
      const int64_t start = y_ - dilation_ - 1;
      const Walk w = {image_row(near, start) - dilation_, image_row(far, start) - dilation_, cut_.image_pitch, dilation_, length,
                      regular(), plane_of(0, p), summed ? plane_of(0, p - 2) : nullptr, summed ? plane_of(0, p - 1) : nullptr,
                      summed ? sum_of(0, p - 1) : nullptr, cut_.pitch, (cut_.ring + cut_.sums) * slots_ * cut_.pitch};
      (summed ? walk<true> : walk<false>)(w);
    }
    for (int f = 0; f < kFields; ++f) {
      const int64_t* v = plan_.fields[f].v;
      const int64_t other = v[0] ? far : near;
      for (int64_t slot = three_ ? regular() : 0; slot < counts_[f]; ++slot) {
        float* to = plane_of(f, p) + slot * cut_.pitch;
        for (int64_t i = -radius_; i <= radius_; ++i) {
          const Source& source = sources_.data[f * slots_ + slot];
          const int64_t y = slot < regular() ? y_ - dilation_ + slot + i : clamped(source.y + i, height_) + source.shift;
          (i == -radius_ ? square<true> : square<false>)(
              image_row(near, y) - dilation_, image_row(other, y + v[1]) - dilation_ + v[2], length, to);
        }
        if (!summed) continue;
        float* sum = sum_of(f, p - 1) + slot * cut_.pitch;
        add<true>(plane_of(f, p - 2) + slot * cut_.pitch, length, sum);
        add<false>(plane_of(f, p - 1) + slot * cut_.pitch, length, sum);
        add<false>(to, length, sum);
      }
    }
  }

  int64_t slot_of(int k, int64_t y) const { return slot_.data[k * (y_end_ - y_) + y - y_]; }

  // Where each pair's sums along y and z for an output row are, at x = 0.
  void find_rows(int64_t z, int64_t y, const float** rows) const {
    for (int k = 0; k < kPairs; ++k) {
      const Pair& pair = plan_.pairs[k];
      rows[k] = sum_of(pair.field, z + pair.shift[0]) + slot_of(k, y) * cut_.pitch + dilation_ + pair.shift[2];
    }
  }

  // The same where the box leaves the volume along z, and for boxes of other sizes, whose rows start `radius` to the left.
  void sum_rows(int64_t z, int64_t y, const float** rows) {
    const int64_t margin = three_ ? 0 : radius_;
    for (int k = 0; k < kPairs; ++k) {
      const Pair& pair = plan_.pairs[k];
      float* row = row_.data + k * row_pitch();
      rows[k] = row;
      row += margin;
      for (int64_t i = -radius_; i <= radius_; ++i) {
        const float* plane = plane_of(pair.field, clamped(z + i, depth_) + pair.shift[0]);
        (i == -radius_ ? add<true> : add<false>)(plane + slot_of(k, y) * cut_.pitch + dilation_ + pair.shift[2], width_, row);
      }
      for (int64_t x = 1; x <= margin; ++x) row[-x] = row[0], row[width_ - 1 + x] = row[width_ - 1];
    }
  }

  void describe(const float* const* rows, const Limits& limits, int64_t z, int64_t y) const {
    const auto function = three_ ? descriptors_of<true> : descriptors_of<false>;
    const int64_t voxels = depth_ * height_ * width_, at = sample_ * kPairs * voxels + (z * height_ + y) * width_;
    if (a_.out_type == kFloat32) {
      function(rows, width_, taps_, limits, static_cast<float*>(a_.out) + at, voxels);
      return;
    }
    function(rows, width_, taps_, limits, out_.data, row_pitch());
    for (int k = 0; k < kPairs; ++k) store_(out_.data + k * row_pitch(), a_.out, at + k * voxels, 1, width_);
  }

  const MindSscArguments& a_;
  const Plan& plan_;
  const Cut& cut_;
  const LoadRow load_;
  const StoreRow store_;
  const bool three_;  // whether boxes are of three voxels along each axis, for which there is a shorter way
  const int64_t radius_, dilation_, taps_, depth_, height_, width_;
  const int64_t around_;  // rows of the image that are needed before and after a strip
  const int64_t slots_;
  Scratch<float> image_, planes_, row_, out_;
  Scratch<int32_t> slot_;
  Scratch<Source> sources_;
  int64_t counts_[kFields];
  int64_t sample_, y_, y_end_, first_, loaded_;  // planes: the first that is made, the last of the image that was loaded
};

Limits limits_of(const MindSscArguments& a, const double* sums, int64_t n) {
  const int64_t rows = a.size[0] * a.size[1], side = 2 * a.radius + 1;
  double total = 0;
  for (int64_t i = 0; i < rows; ++i) total += sums[n * rows + i];
  double usual = total / double(kPairs) / (double(rows) * double(a.size[2]));
  usual = usual < 0 ? 0 : usual;  // distances that are all alike may leave a rounding error; what is no number stays
  return {float(usual * 1e-3), float(usual * 1e3), float(double(kFloor) * double(side * side * side))};
}

int mind_ssc(const MindSscArguments& a) {
  if (!load_for(a.image_type) || !store_for(a.out_type)) return kBadType;
  const Plan plan(a.dilation);
  const Cut cut(a);
  const int64_t rows = a.size[0] * a.size[1], strips = a.batch * cut.per_sample;
  Scratch<double> sums(a.batch * rows);
  Scratch<Limits> limits(a.batch);
  if (!sums.data || !limits.data) return kNoMemory;
  const int team = int(least(a.threads, 1 + a.batch * rows * a.size[2] / kSerial));
  int status = kOk;
#pragma omp parallel num_threads(team)
  {
    Strip strip(a, plan, cut);
    if (!strip.ok()) {
#pragma omp atomic write
      status = kNoMemory;
    }
#pragma omp barrier
    if (status == kOk) {
      for (int sweep = 0; sweep < 2; ++sweep) {
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < strips; ++task) {
          const int64_t n = task / cut.per_sample, rest = task % cut.per_sample;
          const int64_t z = rest / cut.per_plane * cut.planes, y = rest % cut.per_plane * cut.rows;
          strip.run(n, z, least(a.size[0], z + cut.planes), y, least(a.size[1], y + cut.rows), sweep ? limits.data + n : nullptr,
                    sums.data);
        }
        if (sweep == 0) {
#pragma omp for
          for (int64_t n = 0; n < a.batch; ++n) limits.data[n] = limits_of(a, sums.data, n);
        }
      }
    }
  }
  return status;
}

}  // namespace

DGF_ENTRY(mind_ssc, MindSscArguments) {
  return arguments->bytes == sizeof(MindSscArguments) ? mind_ssc(*arguments) : int(kOtherVersion);
}
