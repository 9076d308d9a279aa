// The connectome as kernels read it: for every receiver the list of blocks it sums over, for every block what its
// gradient is made of, and which block of threads runs which neurons in the brain launch.
#include <algorithm>
#include <cstdlib>
#include <functional>
#include <map>
#include <numeric>
#include <queue>

#include "model.h"

namespace neurogen::cuda {
namespace {

constexpr int kTileCost = 4;        // a neuron update costs about as much as this many blocks
constexpr int kLeastRectangle = 8;  // blocks
constexpr int kQuartetTerms = 8;    // from so many terms on a quartet pays

// Blocks of the embedding that a tile hears, on average, up to which the brain launch multiplies by them: cheaper than
// writing their sums to memory (4 bytes a neuron) and reading them there. Many are cheaper for all tokens at once.
constexpr int64_t kInsideTerms = 4;

// Tiles change places while that makes the most loaded share lighter: it is the one that all others wait for.
void even_out(std::vector<std::vector<int>>& shares, const std::function<int64_t(int)>& cost_of) {
  std::vector<int64_t> loads;
  for (const std::vector<int>& tiles : shares) {
    loads.push_back(0);
    for (int tile : tiles) loads.back() += cost_of(tile);
  }
  const auto lighten = [&] {
    const size_t heavy = std::max_element(loads.begin(), loads.end()) - loads.begin();
    const size_t light = std::min_element(loads.begin(), loads.end()) - loads.begin();
    int64_t least = loads[heavy], moved = 0;
    std::pair<int*, int*> exchange;
    for (int& mine : shares[heavy]) {
      for (int& other : shares[light]) {
        const int64_t less = cost_of(mine) - cost_of(other), most = std::max(loads[heavy] - less, loads[light] + less);
        if (most < least) least = most, moved = less, exchange = {&mine, &other};
      }
    }
    if (moved == 0) return false;
    std::swap(*exchange.first, *exchange.second);
    loads[heavy] -= moved, loads[light] += moved;
    return true;
  };
  while (lighten()) {
  }
}

// Receivers first, then terms: a list built receiver by receiver.
struct ListBuilder {
  std::vector<std::vector<Term>> of;
  explicit ListBuilder(int64_t receivers) : of(receivers) {}

  std::vector<Term> terms() const {
    std::vector<Term> out;
    for (const auto& some : of) out.insert(out.end(), some.begin(), some.end());
    return out;
  }
  std::vector<int32_t> begin() const {
    std::vector<int32_t> out{0};
    for (const auto& some : of) out.push_back(out.back() + static_cast<int32_t>(some.size()));
    return out;
  }
};

// Whether four receivers from `first` on hear the same, in the same order.
bool is_quartet(const std::vector<std::vector<Term>>& of, int first) {
  const auto same = [](const Term& x, const Term& y) { return x.source == y.source; };
  const std::vector<Term>& terms = of[first];
  const auto as_first = [&](const std::vector<Term>& other) {
    return std::equal(terms.begin(), terms.end(), other.begin(), other.end(), same);
  };
  return terms.size() >= kQuartetTerms && std::all_of(&of[first] + 1, &of[first] + kQuartet, as_first);
}

// Of `count` rows or columns of blocks that are cut into rectangles: how many the rectangle of `at` has.
int64_t rectangle_part(int64_t at, int64_t count, int64_t whole) { return std::min(whole, count - at / whole * whole); }

int stream_group_override() {
  const char* text = std::getenv("NEUROGEN_STREAM_GROUP");
  if (!text) return 0;
  char* end = nullptr;
  const long value = std::strtol(text, &end, 10);
  if (*end || value < 1 || value > (1 << 30)) {
    throw std::invalid_argument(std::string("NEUROGEN_STREAM_GROUP: expected a positive integer, got '") + text + "'");
  }
  return static_cast<int>(value);
}

// Which brain launch: for tests and measuring. sparse: that of forward.cu. registers: that one, or those of
// register_brain.cu where they fit. dense: that of dense_brain.cu for every connectome (bf16, and calls large enough).
std::string brain_override() {
  const char* text = std::getenv("NEUROGEN_BRAIN");
  const std::string name = text ? text : "";
  if (name != "" && name != "sparse" && name != "registers" && name != "dense") {
    throw std::invalid_argument("NEUROGEN_BRAIN: expected sparse, registers or dense, got '" + name + "'");
  }
  return name;
}

// The same for credit of many streams. lanes: always credit.cuh. bulk: bulk_credit.cuh wherever the device has its
// copies.
std::string credit_override() {
  const char* text = std::getenv("NEUROGEN_CREDIT");
  const std::string name = text ? text : "";
  if (name != "" && name != "lanes" && name != "bulk") {
    throw std::invalid_argument("NEUROGEN_CREDIT: expected lanes or bulk, got '" + name + "'");
  }
  return name;
}

}  // namespace

void CudaModel::connect() {
  brain_wanted_ = brain_override();
  credit_wanted_ = credit_override();
  const int count = static_cast<int>(spec_.regions.size());
  regions_.assign(count, RegionView{});
  history_.assign(count, 0);
  first_block_ = {0};
  for (const ProjectionSpec& p : spec_.projections) {
    first_block_.push_back(first_block_.back() + int64_t{spec_.width(p.dst) / kBlock} * p.blocks_per_row);
    output_hears_embedding_ |= p.src == kFromEmbedding && p.dst == spec_.readout();
    if (p.src >= 0) history_[p.src] = std::max(history_[p.src], p.delay);
    if (p.dst < count) regions_[p.dst].gated |= p.gate, regions_[p.dst].hears_delayed |= p.delay > 0;
  }
  blocks_ = first_block_.back();
  sequence_.resize(count);
  std::iota(sequence_.begin(), sequence_.end(), 0);
  std::stable_sort(sequence_.begin(), sequence_.end(),
                   [&](int x, int y) { return spec_.regions[x].level < spec_.regions[y].level; });
  for (int i = 0; i < count; ++i) {
    const RegionSpec& spec = spec_.regions[sequence_[i]];
    if (i == 0 || spec.level != spec_.regions[sequence_[i - 1]].level) level_begin_.push_back(tiles_);
    RegionView& region = regions_[sequence_[i]];
    region.n = spec.neurons;
    region.rank = static_cast<int>(level_begin_.size()) - 1;
    region.history = history_[sequence_[i]];
    region.first_tile = tiles_;
    tiles_ += spec.neurons / kBlock;
  }
  levels_ = static_cast<int>(level_begin_.size());
  level_begin_.push_back(tiles_);
}

void CudaModel::lay_out_connectome() {
  const char* part = "connectome";
  int64_t brain = 0, drive = 0, gate = 0, hear = 0, pull = 0, embed_pull = 0, rectangles = 0;
  for (size_t i = 0; i < spec_.projections.size(); ++i) {
    const ProjectionSpec& p = spec_.projections[i];
    const int64_t blocks = first_block_[i + 1] - first_block_[i];
    const bool embedded = p.src == kFromEmbedding, spoken = p.dst == spec_.readout();
    if (spoken) hear += blocks;
    if (embedded && !spoken) (p.gate ? gate : drive) += blocks;
    if (!embedded && !spoken) brain += blocks;
    if (embedded) embed_pull += blocks;
    if (!embedded && p.delay == 0) pull += blocks;
    const int64_t rows = wide(p, 0, 0) ? spec_.width(p.dst) / kBlock : 0, columns = spec_.width(p.src) / kBlock;
    for (int64_t row = 0; row < rows; row += kRectangleRows) {
      for (int64_t col = 0; col < columns; col += kRectangleColumns) rectangles += wide(p, row, col);
    }
  }
  const auto list = [&](ProductList& to, int64_t receivers, int64_t terms) {
    to.terms = arena_.take<Term>(part, terms);
    to.begin = arena_.take<int32_t>(part, receivers + 1);
    to.quartets = arena_.take<Quartet>(part, receivers / kQuartet);
    to.soloists = arena_.take<int32_t>(part, receivers);
  };
  const int64_t dim_tiles = spec_.dim / kBlock;
  list(embed_drive_, tiles_, drive);
  list(embed_gate_, tiles_, gate);
  list(pull_, tiles_, pull);
  list(embed_pull_, dim_tiles, embed_pull);
  list(hear_, dim_tiles, hear);
  tile_names_ = arena_.take<TileName>(part, tiles_);
  groups_ = arena_.take<BlockGroup>(part, most_groups(blocks_));
  rectangles_ = arena_.take<Rectangle>(part, rectangles);
  inside_.usable = drive + gate <= kInsideTerms * tiles_;
  for (BrainPlan* plan : {&outside_, &inside_}) {
    if (plan == &inside_ && !inside_.usable) continue;
    const int64_t terms = brain + (plan == &inside_ ? drive + gate : 0);
    plan->tiles = arena_.take<BrainTile>(part, tiles_);
    plan->terms = arena_.take<Term>(part, terms);
    plan->shares = arena_.take<Share>(part, tiles_);
    plan->resident = arena_.take<int32_t>(part, terms);
  }
  lay_out_dense(brain);
}

// Does the gradient of this block belong to a rectangle? The first of a projection is the largest. One of a few blocks
// is not worth it, for it takes as long as a full one.
bool CudaModel::wide(const ProjectionSpec& p, int64_t row, int64_t col) const {
  const int64_t rows = spec_.width(p.dst) / kBlock, columns = spec_.width(p.src) / kBlock;
  if (!spec_.bf16 || p.blocks_per_row != columns) return false;
  return rectangle_part(row, rows, kRectangleRows) * rectangle_part(col, columns, kRectangleColumns) >= kLeastRectangle;
}

// Errors at the receivers of a projection (after the reverse scan), row 0.
const void* CudaModel::error_of(const ProjectionSpec& p) const {
  if (p.dst == spec_.readout()) return readout_error_;
  const RegionView& region = regions_[p.dst];
  if (p.gate) return region.d;
  return p.delay || !region.gated ? region.delta : region.g;
}

// What a projection hears, row 0.
const void* CudaModel::heard_by(const ProjectionSpec& p) const {
  if (p.src == kFromEmbedding) return x_;
  return p.delay ? regions_[p.src].s : regions_[p.src].emitted;
}

void CudaModel::build_lists() {
  divide_brain();
  const int64_t dim_tiles = spec_.dim / kBlock;
  ListBuilder drive(tiles_), gate(tiles_), pull(tiles_), embed_pull(dim_tiles), hear(dim_tiles);
  // Terms of the brain launch by tile: gates, drives, delayed.
  std::vector<std::array<std::vector<Term>, 3>> brain(tiles_);
  std::vector<LearntBlock> learnt, learnt_embedded;  // but for rectangles
  std::vector<Rectangle> rectangles;
  const auto at = [&](const void* panels, int64_t panel) {
    return static_cast<const char*>(panels) + panel * panel_values() * real_size();
  };
  for (size_t i = 0; i < spec_.projections.size(); ++i) {
    const ProjectionSpec& p = spec_.projections[i];
    const int64_t blocks = first_block_[i + 1] - first_block_[i], columns = spec_.width(p.src) / kBlock;
    if (static_cast<int64_t>(p.cols.size()) != blocks) {
      throw std::invalid_argument(p.key + ".cols: expected " + std::to_string(blocks) + " entries, got " +
                                  std::to_string(p.cols.size()));
    }
    const int64_t rows = spec_.width(p.dst) / kBlock;
    const bool embedded = p.src == kFromEmbedding, spoken = p.dst == spec_.readout();
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t row = b / p.blocks_per_row, col = p.cols[b];
      if (col < 0 || col >= columns) {
        throw std::invalid_argument(p.key + ".cols: expected block columns in 0.." + std::to_string(columns - 1) +
                                    ", got " + std::to_string(col) + " at block " + std::to_string(b));
      }
      const int32_t block = static_cast<int32_t>(first_block_[i] + b), panel = static_cast<int32_t>(col);
      const Term forward{at(heard_by(p), col), block, kStreamed, p.delay, p.src, panel, 0};
      const Term backward{at(error_of(p), row), block, kStreamed, 0, -1, 0, 0};
      if (!wide(p, row, col)) {
        (embedded ? learnt_embedded : learnt)
            .push_back({{forward.source, 0, embedded ? -1 : p.src, panel}, {backward.source, p.delay, -1, 0}, block});
      } else if (embedded_in_rectangles_ |= embedded; row % kRectangleRows == 0 && col % kRectangleColumns == 0) {
        rectangles.push_back({backward.source, forward.source, embedded ? -1 : p.src, panel, p.delay,
                              static_cast<int32_t>(rectangle_part(row, rows, kRectangleRows)),
                              static_cast<int32_t>(rectangle_part(col, columns, kRectangleColumns)), block,
                              p.blocks_per_row});
      }
      if (spoken) {
        hear.of[row].push_back(forward);
      } else {
        const int64_t tile = regions_[p.dst].first_tile + row;
        if (embedded) {
          (p.gate ? gate : drive).of[tile].push_back(forward);
        } else {
          brain[tile][p.gate ? 0 : p.delay ? 2 : 1].push_back(forward);
        }
      }
      if (embedded) {
        embed_pull.of[col].push_back(backward);
      } else if (p.delay == 0) {
        pull.of[regions_[p.src].first_tile + col].push_back(backward);
      }
    }
  }
  // Quartets lie inside the ranges that are multiplied at a time: levels, or all of D.
  const auto put = [&](ProductList& list, const ListBuilder& built, const std::vector<int>& ranges) {
    const std::vector<int32_t> begin = built.begin();
    std::vector<Quartet> quartets;
    std::vector<int32_t> soloists;
    list.quartets_before.assign(begin.size(), 0);
    for (size_t range = 0; range + 1 < ranges.size(); ++range) {
      for (int at = ranges[range], end = ranges[range + 1]; at < end;) {
        const bool four = spec_.bf16 && at + kQuartet <= end && is_quartet(built.of, at);
        if (four) quartets.push_back({at, begin[at], begin[at + 1] - begin[at]});
        if (!four) soloists.push_back(at);
        for (int next = at + (four ? kQuartet : 1); at < next;) list.quartets_before[++at] = quartets.size();
      }
    }
    upload(list.terms, built.terms());
    upload(list.begin, begin);
    upload(list.quartets, quartets);
    upload(list.soloists, soloists);
  };
  const std::vector<int> whole{0, static_cast<int>(dim_tiles)};
  put(embed_drive_, drive, level_begin_);
  put(embed_gate_, gate, level_begin_);
  put(pull_, pull, level_begin_);
  put(embed_pull_, embed_pull, whole);
  put(hear_, hear, whole);
  for (int level = 0; level < levels_; ++level) {
    size_t most = 0;
    for (int tile = level_begin_[level]; tile < level_begin_[level + 1]; ++tile) {
      most = std::max(most, pull.of[tile].size());
    }
    most_pulled_.push_back(static_cast<int>(most));
  }
  // As many groups as multiprocessors work on at a time, or a multiple, so that all have something to do to the end.
  const auto grouped = [&](const std::vector<LearntBlock>& blocks) {
    const int64_t count = static_cast<int64_t>(blocks.size()), at_once = int64_t{kGroupsAtOnce} * processors_,
                  turns = (count + at_once * kGroupBlocks - 1) / (at_once * kGroupBlocks),
                  most = turns ? (count + turns * at_once - 1) / (turns * at_once) : 0;
    return group_blocks(blocks, static_cast<int>(std::max<int64_t>(most, kLeastGroup)));
  };
  std::vector<BlockGroup> listed = grouped(learnt);
  const std::vector<BlockGroup> embedded = grouped(learnt_embedded);
  embedded_groups_ = static_cast<int64_t>(embedded.size());
  listed.insert(listed.end(), embedded.begin(), embedded.end());
  group_count_ = static_cast<int64_t>(listed.size());
  for (const auto& terms : embed_pull.of) {
    most_embedded_ = std::max(most_embedded_, static_cast<int>(terms.size()));
    embedded_terms_ += static_cast<int64_t>(terms.size());
  }
  upload(groups_, listed);
  rectangle_count_ = static_cast<int64_t>(rectangles.size());
  upload(rectangles_, rectangles);
  std::vector<TileName> names(tiles_);
  for (size_t r = 0; r < regions_.size(); ++r) {
    for (int tile = 0; tile < regions_[r].n / kBlock; ++tile) {
      names[regions_[r].first_tile + tile] = {static_cast<int32_t>(r), tile * kBlock};
    }
  }
  upload(tile_names_, names);
  upload(region_views_, regions_);
  const auto clear = [&](void* panels, int64_t width) {  // the spare rows too
    if (!panels) return;
    const int64_t spare = kSpareRows * kBlock * real_size();
    NG_CUDA(cudaMemset(static_cast<char*>(panels) - spare, 0, width / kBlock * panel_values() * real_size() + spare));
  };
  for (const RegionView& region : regions_) {
    for (void* panels : {region.u, region.s, region.emitted, region.d, region.g, region.delta}) clear(panels, region.n);
  }
  clear(x_, spec_.dim);
  clear(readout_error_, spec_.dim);
  plan_launch(outside_, names, brain);
  if (!inside_.usable) return;
  for (int tile = 0; tile < tiles_; ++tile) {  // the embedding's first: nobody waits for it
    brain[tile][0].insert(brain[tile][0].begin(), gate.of[tile].begin(), gate.of[tile].end());
    brain[tile][1].insert(brain[tile][1].begin(), drive.of[tile].begin(), drive.of[tile].end());
  }
  plan_launch(inside_, names, brain);
}

BrainTile CudaModel::brain_tile(const TileName& name) const {
  const RegionView& region = regions_[name.region];
  const int64_t panel = name.offset / kBlock;
  const auto at = [&](void* panels) -> void* {
    return panels ? static_cast<char*>(panels) + panel * panel_values() * real_size() : nullptr;
  };
  return {at(region.u),
          at(region.s),
          at(region.emitted),
          at(region.d),
          at(region.g),
          region.constants + panel * 5 * kBlock,
          region.bias + name.offset,
          {},
          name.region,
          name.offset,
          region.rank,
          region.gated,
          {},
          0,
          0};
}

// One block of threads per multiprocessor, several where tiles are few and streams can be divided.
void CudaModel::divide_brain() {
  int shared_limit = 0;
  NG_CUDA(cudaDeviceGetAttribute(&processors_, cudaDevAttrMultiProcessorCount, spec_.device));
  NG_CUDA(cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, spec_.device));
  shared_limit_ = static_cast<size_t>(shared_limit);
  base_grid_ = std::min(processors_, tiles_);
  replicas_ = processors_ / base_grid_;
  stream_group_ = stream_group_override();
}

// Tiles go to blocks of threads, the costliest first to the least loaded. The weights of a block's tiles stay in its
// shared memory until that is full.
void CudaModel::plan_launch(BrainPlan& plan, const std::vector<TileName>& names,
                            const std::vector<std::array<std::vector<Term>, 3>>& brain) {
  std::vector<int> order(tiles_);
  std::iota(order.begin(), order.end(), 0);
  const auto terms_of = [&](int tile) { return brain[tile][0].size() + brain[tile][1].size() + brain[tile][2].size(); };
  std::stable_sort(order.begin(), order.end(), [&](int x, int y) { return terms_of(x) > terms_of(y); });
  using Load = std::pair<int64_t, int>;
  std::priority_queue<Load, std::vector<Load>, std::greater<Load>> loads;
  for (int block = 0; block < base_grid_; ++block) loads.push({0, block});
  std::vector<std::vector<int>> owned(base_grid_);
  const auto cost_of = [&](int tile) { return static_cast<int64_t>(terms_of(tile)) + kTileCost; };
  for (int tile : order) {
    auto [cost, block] = loads.top();
    loads.pop();
    owned[block].push_back(tile);
    loads.push({cost + cost_of(tile), block});
  }
  even_out(owned, cost_of);

  const size_t fixed = regions_.size() * (sizeof(RegionView) + sizeof(StateView)),
               block_bytes = kBlockArea * real_size();
  size_t listed = 0;  // bytes of the largest share's tables
  for (std::vector<int>& tiles : owned) {
    std::sort(tiles.begin(), tiles.end());
    size_t bytes = 0;
    for (int tile : tiles) bytes += sizeof(BrainTile) + terms_of(tile) * kNearTermBytes;
    listed = std::max(listed, bytes);
    plan.most_tiles = std::max(plan.most_tiles, static_cast<int>(tiles.size()));
  }
  plan.near = plan.most_tiles * kNearBytes <= kMostNear;
  plan.table_bytes = (fixed + listed + (plan.near ? plan.most_tiles * kNearBytes : 0) + 127) / 128 * 128;
  if (plan.table_bytes + kWorkBytes > shared_limit_) {
    if (&plan == &inside_) {
      plan.usable = false;
      return;
    }
    throw std::invalid_argument("brain: its connectome's tables need " + std::to_string(plan.table_bytes + kWorkBytes) +
                                " bytes of shared memory a block of threads, this device has " +
                                std::to_string(shared_limit_));
  }
  plan.usable = true;
  const int slots = static_cast<int>((shared_limit_ - plan.table_bytes) / block_bytes);

  const auto all_tiles = [&](auto fits) { return std::all_of(brain.begin(), brain.end(), fits); };
  plan.in_registers = &plan == &inside_ && plan.most_tiles <= kRegisterWarps && all_tiles([](const auto& terms) {
    return terms[0].size() <= kRegisterSlots[0] && terms[1].size() <= kRegisterSlots[1] &&
           terms[2].size() <= kRegisterSlots[2];
  });
  plan.wide = plan.in_registers && plan.most_tiles <= kWideWarps && all_tiles([](const auto& terms) {
                return terms[1].size() < kRegisterSlots[1] || terms[2].size() < kRegisterSlots[2];
              });
  std::vector<BrainTile> tiles;
  std::vector<Term> terms;
  std::vector<Share> shares;
  std::vector<int32_t> resident;
  for (std::vector<int>& mine : owned) {
    if (plan.in_registers) {  // the lightest first: register_brain.cuh puts those where warps are crowded
      std::stable_sort(mine.begin(), mine.end(), [&](int x, int y) { return terms_of(x) < terms_of(y); });
    }
    Share share{};
    share.tile_begin = static_cast<int32_t>(tiles.size());
    share.term_begin = static_cast<int32_t>(terms.size());
    share.resident_begin = static_cast<int32_t>(resident.size());
    int slot = 0, near = 0, far = 0;
    for (int tile : mine) {
      BrainTile entry = brain_tile(names[tile]);
      for (int kind = 0; kind < 3; ++kind) {
        entry.terms[kind] = static_cast<int32_t>(terms.size()) - share.term_begin;
        for (Term term : brain[tile][kind]) {
          if (term.region == kFromEmbedding) entry.heard[kind] = term.source;
          entry.reach = std::max(entry.reach, term.delay);
          if (slot < slots) {
            term.slot = slot++;
            resident.push_back(term.block);
          }
          terms.push_back(term);
        }
      }
      entry.terms[3] = static_cast<int32_t>(terms.size()) - share.term_begin;
      near += register_near(entry.terms), far += wide_far(entry.terms);
      tiles.push_back(entry);
    }
    share.tiles = static_cast<int32_t>(mine.size());
    share.terms = static_cast<int32_t>(terms.size()) - share.term_begin;
    share.residents = slot;
    plan.most_slots = std::max(plan.most_slots, slot);
    plan.most_near = std::max(plan.most_near, near);
    plan.wide_shares.push_back(
        {share.tiles * kRegisterTableBytes + share.terms * kWideRingBytes + far * kWideFarBytes, share.tiles});
    plan.most_terms = std::max<int64_t>(plan.most_terms, share.terms);
    shares.push_back(share);
  }
  upload(plan.tiles, tiles);
  upload(plan.terms, terms);
  upload(plan.shares, shares);
  upload(plan.resident, resident);
  if (&plan == &outside_) plan_dense(names, brain, owned);
}

// Of a call with all streams and tokens.
ExecutionPlan CudaModel::execution_plan() const {
  const BrainPlan& plan = brain_plan(spec_.streams);
  const BrainShape shape = brain_shape(plan, spec_.streams, spec_.max_tokens);
  const auto kib = [](size_t bytes) { return std::to_string((bytes + 512) >> 10) + " KiB"; };
  ExecutionPlan out = {{"device", cuda_device(spec_.device).name},
                       {"precision", spec_.fp8    ? "bf16, the decoder's products of learning fp8"
                                     : spec_.bf16 ? "bf16"
                                                  : "fp32"},
                       {"brain launch", std::to_string(shape.grid) + " blocks of " + std::to_string(kBrainThreads) +
                                            " threads, shared memory of each: " + kib(shape.shared_bytes)},
                       {"streams at a time", std::to_string(shape.group)},
                       {"v and w", shape.local ? "in shared memory" : "in global memory"},
                       {"weights between neurons", "up to " + kib(shape.slots * kBlockArea * real_size()) + " of " +
                                                       kib(plan.most_terms * kBlockArea * real_size()) +
                                                       " in the shared memory of a block, the rest is streamed"},
                       {"logits at a time", std::to_string(logit_rows_) + " rows"}};
  const DenseShape dense = dense_shape(spec_.streams);
  if (dense.group > 0) describe_dense(dense, out);
  if (brain_wanted_ != "sparse") describe_registers(register_shape(plan, spec_.streams), plan, out);
  return out;
}

}  // namespace neurogen::cuda
