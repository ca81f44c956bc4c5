// Every kernel of every instruction set against a plain double precision reference, made to run under
// AddressSanitizer and UndefinedBehaviorSanitizer (make sanitize): each buffer is a heap allocation of
// exactly its size, outputs and scratch memory start as NaN, inputs must come back unchanged, equal calls
// must give equal bits.
#include <utility>

#include "support.h"

namespace {

using namespace seqkernels;
using namespace seqkernels::test;

// Cases
// -------------------------------------------------------------------------------------------------------

enum Cell { kLstm, kLstmProjected, kGru, kRnnTanh, kRnnRelu, kCells };
enum Layout { kContiguous, kBatchFirst, kStrided, kPacked, kLayouts };
constexpr const char* kCellNames[] = {"lstm", "lstm with projection", "gru", "rnn tanh", "rnn relu"};
constexpr const char* kLayoutNames[] = {"contiguous", "batch first", "strided rows", "packed"};
constexpr const char* kWeightNames[] = {"w_ih", "w_hh", "b_ih", "b_hh", "w_hr"};

struct Case {
  Cell cell;
  DType dtype;
  Layout layout;
  int64_t T, B, I, H, P;
  int D, threads;
  bool bias, save_gates, prepacked, resets, want_dx, dy, dhn, dcn, dcells;
  std::vector<int64_t> sizes;  // of the batch at each step
  std::vector<uint8_t> reset;  // [T, B] or empty

  static constexpr double kBound = 64;                        // of errors of f32 and f64, in eps
  DType rounding(const std::string&) const { return dtype; }  // of an output
  bool lstm() const { return cell == kLstm || cell == kLstmProjected; }
  int gates() const { return lstm() ? 4 : cell == kGru ? 3 : 1; }
  DType acc() const { return dtype == DType::f64 ? DType::f64 : DType::f32; }
  int64_t first(int64_t t) const {
    int64_t token = 0;
    for (int64_t i = 0; i < t; i++) token += sizes[size_t(i)];
    return token;
  }
  int64_t tokens() const { return first(T); }
  int64_t x_b() const { return layout == kBatchFirst ? T * I : layout == kStrided ? I + 5 : I; }
  int64_t x_t() const { return layout == kBatchFirst ? I : B * x_b() + (layout == kStrided ? 3 : 0); }
  int64_t x_at(int64_t t, int64_t b) const {
    return layout == kPacked ? (first(t) + b) * x_b() : t * x_t() + b * x_b();
  }
  // The token whose state (t, b) starts from, or -1: the initial state.
  int64_t before(int64_t t, int64_t b, int d) const {
    const int64_t s = d ? t + 1 : t - 1;
    if (s < 0 || s >= T || b >= sizes[size_t(s)] || (!reset.empty() && reset[size_t(t * B + b)])) return -1;
    return first(s) + b;
  }
  Values weight_sizes() const {  // elements, as kWeightNames
    const double rows = double(gates() * H);
    return {rows * double(I), rows * double(P), bias ? rows : 0, bias ? rows : 0,
            cell == kLstmProjected ? double(P * H) : 0};
  }
  std::string text() const {
    char line[320];
    std::snprintf(
        line, sizeof line,
        "%s %s %s T=%d B=%d I=%d H=%d P=%d D=%d threads=%d bias=%d save_gates=%d prepacked=%d resets=%d "
        "dx=%d dy=%d dhn=%d dcn=%d dcells=%d",
        kCellNames[cell], kDTypeNames[int(dtype)], kLayoutNames[layout], int(T), int(B), int(I), int(H),
        int(P), D, threads, bias, save_gates, prepacked, resets, want_dx, dy, dhn, dcn, dcells);
    return line;
  }
};

// Lengths of rows and places of resets, once the sizes are settled.
Case finish(Case c, Random& random) {
  c.sizes.assign(size_t(c.T), c.B);
  if (c.layout == kPacked) {
    std::vector<int64_t> lengths;
    for (int64_t b = 0; b < c.B; b++) lengths.push_back(random.one_in(5) ? 0 : random.below(c.T + 1));
    for (int64_t t = 0; t < c.T; t++)
      c.sizes[size_t(t)] = std::count_if(lengths.begin(), lengths.end(), [t](int64_t n) { return n > t; });
    c.resets = false;
  }
  for (int64_t i = 0; c.resets && i < c.T * c.B; i++) c.reset.push_back(random.one_in(4));
  return c;
}

Case random_case(Cell cell, DType dtype, Layout layout, Random& random) {
  const std::vector<int64_t> units{1, 3, 16, 17, 33, 64, 100};
  Case c{};
  c.cell = cell, c.dtype = dtype, c.layout = layout;
  c.T = random.of<int64_t>({1, 2, 3, 7, 20}), c.B = random.of<int64_t>({1, 2, 3, 13, 40});
  c.I = random.of(units), c.H = random.of(units);
  c.P = cell == kLstmProjected ? random.of(units) : c.H;
  c.D = 1 + int(random.below(2)), c.threads = 1 + int(random.below(3));
  c.bias = !random.one_in(4), c.save_gates = random.one_in(2), c.prepacked = random.one_in(4);
  c.resets = random.one_in(2), c.want_dx = !random.one_in(4);
  c.dy = !random.one_in(4), c.dhn = random.one_in(2), c.dcn = random.one_in(2), c.dcells = random.one_in(3);
  const int64_t step = c.D * c.B * c.gates() * c.H * (c.I + c.P);  // multiply-adds: keep the reference short
  c.T = std::clamp<int64_t>(600000 / step, 1, c.T);
  return finish(c, random);
}

// Beyond a block of the sum (256 units), a chunk of time (128 and 256 tokens) or a part of the rows (256).
Case sized(Case c, int64_t T, int64_t B, int64_t I, int64_t H, Random& random) {
  c.T = T, c.B = B, c.I = I, c.H = H;
  c.P = c.cell == kLstmProjected ? 64 : H;
  c.reset.clear();
  return finish(c, random);
}

// Reference
// ---------------------------------------------------------------------------------------------------

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// out += W v and out += W^T v for W [rows, columns]; dW += u v^T.
void multiply(const Values& w, const double* v, int64_t rows, int64_t columns, double* out) {
  const double* row = w.data();
  for (int64_t i = 0; i < rows; i++, row += columns) {
    double sum = 0;
    for (int64_t k = 0; k < columns; k++) sum += row[k] * v[k];
    out[i] += sum;
  }
}
void multiply_transposed(const Values& w, const double* v, int64_t rows, int64_t columns, double* out) {
  const double* row = w.data();
  for (int64_t i = 0; i < rows; i++, row += columns)
    for (int64_t k = 0; k < columns; k++) out[k] += row[k] * v[i];
}
void outer(const double* u, const double* v, int64_t rows, int64_t columns, Values& dw) {
  double* row = dw.data();
  for (int64_t i = 0; i < rows; i++, row += columns)
    for (int64_t k = 0; k < columns; k++) row[k] += u[i] * v[k];
}

// Values of all tensors by name; weights have the direction's digit behind their names.
struct Reference {
  const Case& c;
  const Truth& in;
  const int64_t I, H, P, GH;

  Reference(const Case& a_case, const Truth& inputs)
      : c(a_case), in(inputs), I(c.I), H(c.H), P(c.P), GH(c.gates() * c.H) {}

  const Values& weight(int k, int d) const { return in.at(kWeightNames[k] + std::to_string(d)); }
  // h_{t-1} or c_{t-1}.
  const double* previous(const Values& outputs, const Values& initial, int64_t t, int64_t b, int d,
                         int64_t n) const {
    const int64_t token = c.before(t, b, d);
    return token < 0 ? &initial[size_t((d * c.B + b) * n)] : &outputs[size_t((token * c.D + d) * n)];
  }
  // Activations [G, H] in the order of the weights, and q = W_hn h + b_hn of the GRU.
  void activate(const double* x, const double* h, int d, Values& a, Values& q) const {
    Values from_x(size_t(GH), 0.0), from_h(size_t(GH), 0.0);
    if (c.bias) from_x = weight(2, d), from_h = weight(3, d);
    multiply(weight(0, d), x, GH, I, from_x.data());
    multiply(weight(1, d), h, GH, P, from_h.data());
    a.resize(size_t(GH));
    q.resize(size_t(H));
    for (int64_t j = 0; j < GH; j++) {
      const size_t i = size_t(j);
      const int64_t gate = j / H;
      const double sum = from_x[i] + from_h[i];
      if (c.cell == kGru && gate == 2) {
        q[size_t(j - 2 * H)] = from_h[i];
        a[i] = std::tanh(from_x[i] + a[size_t(j - 2 * H)] * from_h[i]);
      } else if (c.cell == kRnnRelu) {
        a[i] = std::max(sum, 0.0);
      } else {
        a[i] = c.cell == kRnnTanh || (c.lstm() && gate == 2) ? std::tanh(sum) : sigmoid(sum);
      }
    }
  }

  Truth forward() const {
    const Values &h0 = in.at("h0"), &c0 = in.at("c0"), &xs = in.at("x");
    Truth out{{"hn", h0}};
    Values &y = out["y"], &hn = out["hn"], a, q, m(static_cast<size_t>(H)),
           cells(size_t(c.tokens() * c.D * H)), cn = c0;
    y.assign(size_t(c.tokens() * c.D * P), 0);
    for (int d = 0; d < c.D; d++) {
      for (int64_t s = 0; s < c.T; s++) {
        const int64_t t = d ? c.T - 1 - s : s;
        for (int64_t b = 0; b < c.sizes[size_t(t)]; b++) {
          const int64_t token = c.first(t) + b;
          const double *h_prev = previous(y, h0, t, b, d, P), *c_prev = previous(cells, c0, t, b, d, H);
          double *h = &y[size_t((token * c.D + d) * P)], *cell = &cells[size_t((token * c.D + d) * H)];
          activate(&xs[size_t(c.x_at(t, b))], h_prev, d, a, q);
          for (int64_t u = 0; u < H; u++) {
            const double* g = &a[size_t(u)];
            if (c.lstm()) {
              cell[u] = g[H] * c_prev[u] + g[0] * g[2 * H];
              m[size_t(u)] = g[3 * H] * std::tanh(cell[u]);
            } else {
              m[size_t(u)] = c.cell == kGru ? (1 - g[H]) * g[2 * H] + g[H] * h_prev[u] : g[0];
            }
          }
          if (c.cell == kLstmProjected)
            multiply(weight(4, d), m.data(), P, H, h);
          else
            std::copy(m.begin(), m.end(), h);
          std::copy(h, h + P, &hn[size_t((d * c.B + b) * P)]);
          std::copy(cell, cell + H, &cn[size_t((d * c.B + b) * H)]);
        }
      }
    }
    if (c.lstm()) out["cells"] = cells, out["cn"] = cn;
    return out;
  }

  // y and cells as given to the kernel: rounded.
  Truth backward(const Values& y, const Values& cells) const {
    const Values &h0 = in.at("h0"), &c0 = in.at("c0"), &xs = in.at("x");
    const auto gradient = [&](const char* name, int64_t n) {
      const auto found = in.find(name);
      return found == in.end() ? Values(size_t(n), 0.0) : found->second;
    };
    const Values dy = gradient("dy", c.tokens() * c.D * P), dcells = gradient("dcells", c.tokens() * c.D * H);
    Values dhs = gradient("dhn", c.D * c.B * P), dcs = gradient("dcn", c.D * c.B * H);
    Truth out;
    Values &dx = out["dx"], &dh0 = out["dh0"], dc0(dcs.size()), a, q, dm(static_cast<size_t>(H)),
           m(static_cast<size_t>(H)), di(static_cast<size_t>(GH)), dr(static_cast<size_t>(GH));
    dx.assign(size_t(c.tokens() * I), 0);
    dh0.assign(dhs.size(), 0);
    for (int d = 0; d < c.D; d++) {
      Values* dw[5];
      for (int k = 0; k < 5; k++) {
        const std::string name = kWeightNames[k] + std::to_string(d);
        const auto found = in.find(name);
        dw[k] = found == in.end() ? nullptr : &(out["d" + name] = Values(found->second.size()));
      }
      for (int64_t s = c.T - 1; s >= 0; s--) {
        const int64_t t = d ? c.T - 1 - s : s;
        for (int64_t b = 0; b < c.sizes[size_t(t)]; b++) {
          const int64_t token = c.first(t) + b, at = token * c.D + d;
          const double *x = &xs[size_t(c.x_at(t, b))], *h_prev = previous(y, h0, t, b, d, P),
                       *c_prev = c.lstm() ? previous(cells, c0, t, b, d, H) : nullptr;
          double *dh = &dhs[size_t((d * c.B + b) * P)], *dc = &dcs[size_t((d * c.B + b) * H)];
          activate(x, h_prev, d, a, q);
          for (int64_t i = 0; i < P; i++) dh[i] += dy[size_t(at * P + i)];
          if (c.cell == kLstmProjected) {
            std::fill(dm.begin(), dm.end(), 0.0);
            multiply_transposed(weight(4, d), dh, P, H, dm.data());
          } else {
            dm.assign(dh, dh + H);
          }
          Values direct(static_cast<size_t>(P));  // what reaches h_{t-1} past W_hh
          for (int64_t u = 0; u < H; u++) {
            const double *g = &a[size_t(u)], dmu = dm[size_t(u)];
            double *gi = &di[size_t(u)], *gr = &dr[size_t(u)];
            if (c.lstm()) {
              const double th = std::tanh(cells[size_t(at * H + u)]), i = g[0], f = g[H], n = g[2 * H],
                           o = g[3 * H];
              m[size_t(u)] = o * th;
              dc[u] += dmu * o * (1 - th * th) + dcells[size_t(at * H + u)];
              gi[0] = dc[u] * n * i * (1 - i);
              gi[H] = dc[u] * c_prev[u] * f * (1 - f);
              gi[2 * H] = dc[u] * i * (1 - n * n);
              gi[3 * H] = dmu * th * o * (1 - o);
              dc[u] *= f;
            } else if (c.cell == kGru) {
              const double r = g[0], z = g[H], n = g[2 * H], dn = dmu * (1 - z) * (1 - n * n);
              gi[0] = dn * q[size_t(u)] * r * (1 - r);
              gi[H] = dmu * (h_prev[u] - n) * z * (1 - z);
              gi[2 * H] = dn;
              direct[size_t(u)] = dmu * z;
            } else {
              const double h = y[size_t(at * P + u)];
              gi[0] = c.cell == kRnnTanh ? dmu * (1 - h * h) : h > 0 ? dmu : 0;
            }
            for (int g_ = 0; g_ < c.gates(); g_++) gr[g_ * H] = gi[g_ * H];
            if (c.cell == kGru) gr[2 * H] *= g[0];
          }
          outer(di.data(), x, GH, I, *dw[0]);
          outer(dr.data(), h_prev, GH, P, *dw[1]);
          for (size_t i = 0; dw[2] && i < size_t(GH); i++) (*dw[2])[i] += di[i], (*dw[3])[i] += dr[i];
          if (dw[4]) outer(dh, m.data(), P, H, *dw[4]);
          multiply_transposed(weight(0, d), di.data(), GH, I, &dx[size_t(token * I)]);
          multiply_transposed(weight(1, d), dr.data(), GH, P, direct.data());
          std::copy(direct.begin(), direct.end(), dh);
          if (c.before(t, b, d) < 0) {
            for (int64_t i = 0; i < P; i++) dh0[size_t((d * c.B + b) * P + i)] += std::exchange(dh[i], 0.0);
            for (int64_t u = 0; u < H; u++) dc0[size_t((d * c.B + b) * H + u)] += std::exchange(dc[u], 0.0);
          }
        }
      }
      for (int64_t b = c.sizes[0]; b < c.B; b++) {  // rows of length zero
        std::copy_n(&dhs[size_t((d * c.B + b) * P)], P, &dh0[size_t((d * c.B + b) * P)]);
        std::copy_n(&dcs[size_t((d * c.B + b) * H)], H, &dc0[size_t((d * c.B + b) * H)]);
      }
    }
    if (c.lstm()) out["dc0"] = dc0;
    if (!c.want_dx) out.erase("dx");
    return out;
  }
};

// Kernels
// -----------------------------------------------------------------------------------------------------

// What all calls of one case share.
void fill(LayerParams& p, const Case& c, const Buffers& in, const Parallel& parallel) {
  p.dtype = c.dtype;
  p.T = c.T, p.B = c.B, p.I = c.I, p.H = c.H, p.P = c.P, p.D = c.D;
  p.x = pointer(in, "x"), p.x_t = c.layout == kPacked ? 0 : c.x_t(), p.x_b = c.x_b();
  p.h0 = pointer(in, "h0");
  p.batch_sizes = c.layout == kPacked ? c.sizes.data() : nullptr;
  p.resets = c.reset.empty() ? nullptr : c.reset.data();
  for (int d = 0; d < c.D; d++) {
    const auto w = [&](int k) { return pointer(in, kWeightNames[k] + std::to_string(d)); };
    p.w[d] = {w(0), w(1), w(2), w(3), w(4)};
  }
  p.parallel = parallel;
}

Buffer pack(const Case& c, const Buffers& in) {
  LayerParams p;
  fill(p, c, in, Parallel{});
  const KernelTable& k = kernels(c.dtype);
  const auto packer = c.lstm() ? k.lstm_pack : c.cell == kGru ? k.gru_pack : k.rnn_pack;
  Buffer panels(DType::bf16, packer(p, nullptr) / 2);
  packer(p, panels.data());
  return panels;
}

Buffers forward(const Case& c, const Buffers& in, const Parallel& parallel, bool inference) {
  const int64_t tokens = c.tokens() * c.D;
  Buffers out;
  const auto make = [&](const char* name, int64_t n, bool acc = false) {
    return out.insert_or_assign(name, Buffer(acc ? c.acc() : c.dtype, n)).first->second.data();
  };
  Buffer panels;
  const auto common = [&](LayerFwdParams& p) {
    fill(p, c, in, parallel);
    if (c.prepacked) panels = pack(c, in), p.panels = panels.data();
    p.y = make("y", tokens * c.P);
    if (!inference) p.hn = make("hn", c.D * c.B * c.P);
    if (!inference && c.save_gates && c.gates() > 1) p.gates = make("gates", tokens * 4 * c.H);
  };
  if (c.lstm()) {
    LstmFwdParams p;
    common(p);
    p.c0 = pointer(in, "c0"), p.cn = make("cn", c.D * c.B * c.H);
    if (!inference) p.cells = make("cells", tokens * c.H, true);
    lstm_fwd(p);
  } else if (c.cell == kGru) {
    GruFwdParams p;
    common(p);
    gru_fwd(p);
  } else {
    RnnFwdParams p;
    common(p);
    p.relu = c.cell == kRnnRelu;
    rnn_fwd(p);
  }
  return out;
}

// `given`: y and cells; `saved`: gates of forward.
Buffers backward(const Case& c, const Buffers& in, const Buffers& given, const Buffers& saved,
                 const Parallel& parallel) {
  Buffers out;
  const auto make = [&](const std::string& name, int64_t n) {
    return out.insert_or_assign(name, Buffer(c.dtype, n)).first->second.data();
  };
  const auto common = [&](LayerBwdParams& p) {
    fill(p, c, in, parallel);
    p.y = pointer(given, "y"), p.gates = pointer(saved, "gates");
    p.dy = pointer(in, "dy"), p.dhn = pointer(in, "dhn");
    if (c.want_dx) p.dx = make("dx", c.tokens() * c.I);
    p.dh0 = make("dh0", c.D * c.B * c.P);
    for (int d = 0; d < c.D; d++) {
      const auto dw = [&](int k) {
        const int64_t n = int64_t(c.weight_sizes()[size_t(k)]);
        return n ? make("d" + (kWeightNames[k] + std::to_string(d)), n) : nullptr;
      };
      p.dw[d] = {dw(0), dw(1), dw(2), dw(3), dw(4)};
    }
  };
  if (c.lstm()) {
    LstmBwdParams p;
    common(p);
    p.c0 = pointer(in, "c0"), p.cells = pointer(given, "cells");
    p.dcn = pointer(in, "dcn"), p.dcells = pointer(in, "dcells");
    p.dc0 = make("dc0", c.D * c.B * c.H);
    lstm_bwd(p);
  } else if (c.cell == kGru) {
    GruBwdParams p;
    common(p);
    gru_bwd(p);
  } else {
    RnnBwdParams p;
    common(p);
    p.relu = c.cell == kRnnRelu;
    rnn_bwd(p);
  }
  return out;
}

void check(const Case& c, const std::vector<const char*>& isas, Random& random) {
  Buffers in;
  const auto input = [&](const std::string& name, int64_t n, double scale = 1, bool acc = false) {
    in.insert_or_assign(name, Buffer(acc ? c.acc() : c.dtype, random.values(n, scale)));
  };
  const int64_t tokens = c.tokens(), states = c.D * c.B;
  int64_t x_size = 0;
  for (int64_t t = 0; t < c.T; t++)
    if (c.sizes[size_t(t)]) x_size = std::max(x_size, c.x_at(t, c.sizes[size_t(t)] - 1) + c.I);
  Values x(size_t(x_size), NAN);  // what lies between the rows is not to be read
  for (int64_t t = 0; t < c.T; t++)
    for (int64_t b = 0; b < c.sizes[size_t(t)]; b++) {
      const Values row = random.values(c.I, 1);
      std::copy(row.begin(), row.end(), &x[size_t(c.x_at(t, b))]);
    }
  in.insert_or_assign("x", Buffer(c.dtype, x));
  input("h0", states * c.P), input("c0", states * c.H);
  for (int d = 0; d < c.D; d++)
    for (int k = 0; k < 5; k++)
      if (const int64_t n = int64_t(c.weight_sizes()[size_t(k)]))
        input(kWeightNames[k] + std::to_string(d), n,
              1 / std::sqrt(double(k == 0   ? c.I
                                   : k == 1 ? c.P
                                            : c.H)));
  if (c.dy) input("dy", tokens * c.D * c.P);
  if (c.dhn) input("dhn", states * c.P);
  if (c.dcn) input("dcn", states * c.H);
  if (c.dcells) input("dcells", tokens * c.D * c.H, 1, true);

  Truth rounded;
  for (const auto& [name, buffer] : in) rounded[name] = buffer.values();
  const Reference reference(c, rounded);
  const Truth truth = reference.forward();
  Buffers given;
  given.insert_or_assign("y", Buffer(c.dtype, truth.at("y")));
  if (c.lstm()) given.insert_or_assign("cells", Buffer(c.acc(), truth.at("cells")));
  const Truth gradients =
      reference.backward(given.at("y").values(), c.lstm() ? given.at("cells").values() : Values{});

  const Parallel team = c.threads == 1 ? Parallel{} : threads(c.threads);
  const Parallel odd = random.one_in(2) ? nested(3) : busy(3);
  for (const char* isa : isas) {
    force_isa(isa);
    const Buffers out = forward(c, in, team, false), again = forward(c, in, team, false),
                  brief = forward(c, in, team, true), few = forward(c, in, odd, false);
    expect_close(out, truth, "forward", c);
    expect_close(few, truth, "forward", c);
    expect_same_bits(again, out, "second run", c);
    expect_same_bits(brief, out, "nothing saved", c);
    const Buffers grads = backward(c, in, given, out, team), regrads = backward(c, in, given, out, team),
                  grads_few = backward(c, in, given, few, odd);
    expect_close(grads, gradients, "backward", c);
    expect_close(grads_few, gradients, "backward", c);
    expect_same_bits(regrads, grads, "second run", c);
    if (grads.size() != gradients.size()) fail("gradients are missing", c);
    expect_unchanged(in, c);
    expect_unchanged(given, c);
    seen[isa] += 7;
  }
  const int n = 7 * int(isas.size());
  calls += n;
  seen[kCellNames[c.cell]] += n, seen[kDTypeNames[int(c.dtype)]] += n, seen[kLayoutNames[c.layout]] += n;
  seen[std::to_string(c.D) + (c.D == 1 ? " direction" : " directions")] += n;
  seen[std::to_string(c.threads) + (c.threads == 1 ? " thread" : " threads")] += n;
  seen[c.save_gates ? "saved gates" : "recomputed gates"] += n;
  if (c.resets) seen["resets"] += n;
  if (c.sizes[0] < c.B) seen["rows of length zero"] += n;
}

}  // namespace

int main() {
  std::vector<const char*> isas;
  for (int i = 0; i < kIsaCount; i++)
    if (isa_supported(Isa(i))) isas.push_back(isa_name(Isa(i)));

  Random random;
  for (int cell = 0; cell < kCells; cell++)
    for (int dtype = 0; dtype < 4; dtype++) {
      for (int layout = 0; layout < kLayouts; layout++)
        for (int i = 0; i < 4; i++)
          check(random_case(Cell(cell), DType(dtype), Layout(layout), random), isas, random);
      check(sized(random_case(Cell(cell), DType(dtype), kContiguous, random), 1, 20, 270, 33, random), isas,
            random);
      check(sized(random_case(Cell(cell), DType(dtype), kStrided, random), 2, 9, 3, 261, random), isas,
            random);
      check(sized(random_case(Cell(cell), DType(dtype), kPacked, random), 150, 7, 3, 17, random), isas,
            random);
      check(sized(random_case(Cell(cell), DType(dtype), kBatchFirst, random), 3, 300, 16, 3, random), isas,
            random);
      check(sized(random_case(Cell(cell), DType(dtype), kPacked, random), 3, 600, 3, 5, random), isas,
            random);
      check(sized(random_case(Cell(cell), DType(dtype), kStrided, random), 1, 600, 3, 5, random), isas,
            random);
      Case empty = random_case(Cell(cell), DType(dtype), kPacked, random);
      empty.sizes.assign(size_t(empty.T), 0);
      check(empty, isas, random);
    }
  check_attention(isas);
  check_additive_attention(isas);
  check_linear(isas);
  check_shares();

  std::printf("%d calls;", calls);
  for (const auto& [what, n] : seen) std::printf(" %s: %d,", what.c_str(), n);
  std::printf("\nlargest errors in eps;");
  for (const auto& [what, in_eps] : worst) std::printf(" %s: %.1f,", what.c_str(), in_eps);
  std::printf("\n%s\n", failures ? (std::to_string(failures) + " checks FAILED").c_str() : "all as expected");
  return failures != 0;
}
