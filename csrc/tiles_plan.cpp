#include "tiles_plan.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

namespace vicinal {

namespace {

constexpr int64_t PANEL_BYTES = 448 << 10;  // of a second-level cache of half a megabyte and more
constexpr int64_t LARGE_PANEL_BYTES = 896 << 10;  // where there are matrix registers that cache has two megabytes
// Of a unit that does its whole backward, panel and sums together: what a row of tiles sees, and all.
constexpr int64_t NEAR_BYTES = 1280 << 10, CLOSED_BYTES = 4 << 20;
constexpr double BACKWARD_WORK = 2.5;  // in times of the forward's
constexpr double OTHER_WORK = 0.4;     // that it saves
constexpr int64_t STATE_BYTES = 256 << 10;
constexpr double REACH_BYTES = 4352 << 10;  // about half of what a second-level TLB knows, in pages of 4 KB; fitted
constexpr double NEAR_HEADS_BYTES = 2 << 20;  // of a block that heads take turns in: what a second-level cache keeps
constexpr int64_t EVEN_SHARES = 8;  // units should come out even on so many threads; not on the threads there are,
                                    // so that results do not depend on them

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }
int64_t floor_mod(int64_t a, int64_t b) { return a - floor_div(a, b) * b; }
int64_t ceil_div(int64_t a, int64_t b) { return floor_div(a + b - 1, b); }

SourceAxis forward_axis(const AxisTable& table, bool takes_bias, int64_t bias_length) {
    SourceAxis axis;
    axis.step = static_cast<int32_t>(table.step);
    axis.turn = table.wraps ? static_cast<int32_t>(table.length / table.step) : 0;
    for (int64_t query = 0; query < table.queries; ++query) {
        const int64_t first = floor_mod(table.start[query], table.step);
        int64_t low = (table.start[query] - first) / table.step;
        // who sees nothing may stand beyond the axis; what is packed must not
        if (!table.count[query] && !table.wraps)
            low = std::max<int64_t>(std::min(low, ceil_div(table.length - first, table.step)), 0);
        axis.first.push_back(static_cast<int32_t>(first));
        axis.low.push_back(static_cast<int32_t>(low));
        axis.high.push_back(static_cast<int32_t>(low + table.count[query]));
        const int64_t offset = takes_bias ? floor_div(first - table.center[query], table.step) + bias_length / 2 : 0;
        axis.bias_offset.push_back(static_cast<int32_t>(offset));
    }
    return axis;
}

// Who sees each key when it is taken `turn` turns further along a wrapping axis.
SourceAxis backward_axis(const AxisTable& table, int64_t turn, bool takes_bias, int64_t bias_length) {
    SourceAxis axis;
    const int64_t step = table.step, members = table.wraps ? table.length / step : 0;
    axis.step = static_cast<int32_t>(step);
    axis.low.assign(table.length, 0);
    axis.high.assign(table.length, 0);
    axis.first.assign(table.length, 0);
    axis.bias_offset.assign(table.length, 0);
    for (int64_t c = 0; c < std::min(step, table.queries); ++c) {
        const int64_t residue = floor_mod(table.start[c], step), queries = (table.queries - c + step - 1) / step;
        int64_t low = 0, high = 0;
        for (int64_t key = residue; key < table.length; key += step) {
            const int64_t place = (key - residue) / step + turn * members;
            const auto begin = [&](int64_t p) { return (table.start[c + step * p] - residue) / step; };
            const auto end = [&](int64_t p) { return begin(p) + table.count[c + step * p]; };
            while (low < queries && end(low) <= place) ++low;
            while (high < queries && begin(high) <= place) ++high;
            axis.low[key] = static_cast<int32_t>(low);
            axis.high[key] = static_cast<int32_t>(std::max(low, high));
            axis.first[key] = static_cast<int32_t>(c);
            axis.bias_offset[key] = takes_bias ? static_cast<int32_t>(bias_length / 2 - place) : 0;
        }
    }
    return axis;
}

bool sees_nothing(const SourceAxis& axis) {
    for (size_t i = 0; i < axis.low.size(); ++i)
        if (axis.low[i] < axis.high[i]) return false;
    return true;
}

int64_t widest(const std::vector<SourceList>& lists, int axis) {
    int64_t width = 0;
    for (const SourceList& list : lists)
        for (size_t i = 0; i < list.axis[axis].low.size(); ++i)
            width = std::max<int64_t>(width, list.axis[axis].high[i] - list.axis[axis].low[i]);
    return width;
}

// How an axis is cut into tiles, for one class.
struct Cutting {
    int64_t unit;      // sources of a vector along this axis
    bool is_aligned;   // vectors begin at multiples of `unit` from the segment's first source
    int64_t most;      // targets of a tile
    double each;       // what a vector costs for each of them
    double weight;     // what a vector costs beside its targets, in targets
    bool is_even;      // vectors begin at even sources
};

using Bounds = std::vector<const SourceAxis*>;  // of all lists

// The targets of a class are first, first + step, ...; this looks one up.
struct ClassView {
    const Bounds& lists;
    int64_t first, step, targets;
    int64_t low(size_t list, int64_t target) const { return lists[list]->low[first + step * target]; }
    int64_t high(size_t list, int64_t target) const { return lists[list]->high[first + step * target]; }
};

int64_t vectors_of(const ClassView& view, const Cutting& cutting, int64_t segment, int64_t begin, int64_t end) {
    int64_t total = 0;
    for (size_t list = 0; list < view.lists.size(); ++list) {
        int64_t low = view.low(list, begin), high = view.high(list, end - 1);
        if (cutting.is_aligned) {
            const int64_t anchor = view.low(list, segment);
            low = anchor + floor_div(low - anchor, cutting.unit) * cutting.unit;
        }
        if (cutting.is_even) low = floor_div(low, 2) * 2;
        total += std::max<int64_t>(ceil_div(high - low, cutting.unit), 0);
    }
    return total;
}

// Where windows part: targets from here on share no source with those before.
std::vector<int64_t> segments_of(const ClassView& view) {
    std::vector<int64_t> begins{0};
    for (int64_t target = 1; target < view.targets; ++target) {
        bool parts = true;
        for (size_t list = 0; list < view.lists.size(); ++list)
            parts = parts && view.low(list, target) >= view.high(list, target - 1);
        if (parts) begins.push_back(target);
    }
    begins.push_back(view.targets);
    return begins;
}

// Tiles of one segment with the least sum of (targets + weight) * vectors + weight.
void cut_segment(const ClassView& view, const Cutting& cutting, int64_t begin, int64_t end, std::vector<Run>& tiles) {
    const int64_t count = end - begin;
    std::vector<double> cost(count + 1, 0.0);
    std::vector<int64_t> length(count + 1, 0);
    for (int64_t i = count - 1; i >= 0; --i) {
        cost[i] = 1e300;
        for (int64_t n = 1; n <= std::min(cutting.most, count - i); ++n) {
            const double vectors = static_cast<double>(vectors_of(view, cutting, begin, begin + i, begin + i + n));
            const double total = (cutting.each * n + cutting.weight) * vectors + cutting.weight + cost[i + n];
            if (total < cost[i]) {
                cost[i] = total;
                length[i] = n;
            }
        }
    }
    for (int64_t i = 0; i < count; i += length[i])
        tiles.push_back({static_cast<int32_t>(begin + i), static_cast<int32_t>(begin + i + length[i])});
}

std::vector<Run> cut_class(const ClassView& view, const Cutting& cutting) {
    std::vector<Run> tiles;
    const std::vector<int64_t> begins = segments_of(view);
    for (size_t s = 0; s + 1 < begins.size(); ++s) cut_segment(view, cutting, begins[s], begins[s + 1], tiles);
    return tiles;
}

// Distinct (targets, vectors) of an axis's tiles, and how often each comes.
std::map<std::pair<int64_t, int64_t>, int64_t> kinds_of(const ClassView& view, const Cutting& cutting,
                                                       const std::vector<Run>& tiles) {
    std::map<std::pair<int64_t, int64_t>, int64_t> kinds;
    const std::vector<int64_t> begins = segments_of(view);
    size_t s = 0;
    for (const Run& tile : tiles) {
        while (begins[s + 1] <= tile.begin) ++s;
        ++kinds[{tile.end - tile.begin, vectors_of(view, cutting, begins[s], tile.begin, tile.end)}];
    }
    return kinds;
}

// Cycles of a tile, counted for one plane. What a vector and a tile cost beside their products was fitted to times of
// tiles of many sizes; in the backward, where more tensors are read, a tile costs as much more.
double tile_cost(const PlanRequest& request, double targets, double vectors) {
    const double lanes = request.lanes, busy = std::max(targets, 3.0);
    const double scores = request.key_dim * busy / 2 / request.pair;
    const double sums = ceil_div(request.value_dim, request.lanes) * lanes * busy / 2 / request.pair;
    const double tensors = static_cast<double>(request.floats * request.pair) / (request.key_dim + request.value_dim);
    return vectors * (scores + sums + 12 * targets + 60) + 15 * targets + 90 * tensors;
}

// The first of many targets: windows repeat themselves, and one choice is as good as another for a few at the border.
ClassView some_of(ClassView view) {
    view.targets = std::min<int64_t>(view.targets, 192);
    return view;
}

struct Shape {
    int rows_per_vector;
    Cutting rows, columns;
    double cost;
};

Shape choose_shape(const PlanRequest& request, const ClassView& rows, const ClassView& columns, int64_t widest_row) {
    Shape best{1, {}, {}, 1e300};
    static const int SIZES[][2] = {{1, 8}, {2, 4}, {4, 2}, {8, 1}, {2, 2}, {1, 4}, {4, 1}, {2, 3}, {3, 2}, {1, 7}, {1, 6}, {1, 2}, {1, 1}};
    for (int R = 1; R <= request.lanes; R *= 2) {
        if (R > 1 && R / 2 >= widest_row) break;
        for (const auto& size : SIZES) {
            if ((size[0] > 1 && rows.targets == 1) || (size[1] > 1 && columns.targets == 1)) continue;
            for (double weight : {0.25, 1.0, 3.0}) {
                const Cutting row_cut{R, true, size[0], 1.0, weight, false};
                const Cutting column_cut{request.lanes / R, false, size[1], 1.0, weight, request.pair == 2 && R == 1};
                const auto row_kinds = kinds_of(rows, row_cut, cut_class(rows, row_cut));
                const auto column_kinds = kinds_of(columns, column_cut, cut_class(columns, column_cut));
                double cost = 0;
                for (const auto& [row, row_times] : row_kinds)
                    for (const auto& [column, column_times] : column_kinds)
                        cost += static_cast<double>(row_times) * column_times *
                                tile_cost(request, row.first * column.first, row.second * column.second);
                if (cost < best.cost) best = {R, row_cut, column_cut, cost};
            }
        }
    }
    return best;
}

// Cycles of a tile whose targets stand in lanes, counted for one plane: softmax takes rows of sources one by one, and
// products up to 32 neighbors at once.
double cost_in_lanes(const PlanRequest& request, double rows, double columns) {
    const double products = std::ceil(columns / 32) * static_cast<double>(request.key_dim + request.value_dim) / 2;
    return rows * (12 * columns + products + 20) + 8.0 * static_cast<double>(request.key_dim + request.value_dim) + 200;
}

// The shape of tiles whose targets stand in lanes: as many as there are lanes, or fewer.
Shape choose_shape_in_lanes(const PlanRequest& request, const ClassView& rows, const ClassView& columns) {
    Shape best{1, {}, {}, 1e300};
    for (int64_t down = 1; down <= std::min<int64_t>(request.lanes, rows.targets); ++down) {
        const Cutting row_cut{1, false, down, 0.0, 1.0, false};
        const Cutting column_cut{1, false, std::min<int64_t>(request.lanes / down, columns.targets), 0.0, 1.0, false};
        double cost = 0;
        const auto column_kinds = kinds_of(columns, column_cut, cut_class(columns, column_cut));
        for (const auto& [row, row_times] : kinds_of(rows, row_cut, cut_class(rows, row_cut)))
            for (const auto& [column, column_times] : column_kinds)
                cost += static_cast<double>(row_times) * static_cast<double>(column_times) *
                        cost_in_lanes(request, static_cast<double>(row.second), static_cast<double>(column.second));
        if (cost < best.cost) best = {1, row_cut, column_cut, cost};
    }
    return best;
}

// Where blocks may end: anywhere, with every gap between windows, only there, or so that all are as long.
enum class Ends { ANYWHERE, ALSO_AT_GAPS, ONLY_AT_GAPS, EVENLY };

// Where units that do their whole backward end: where there are windows they hold whole ones.
Ends closed_ends(const ClassView& view, Ends otherwise) {
    if (segments_of(view).size() == 2) return Ends::EVENLY;  // one segment
    return otherwise == Ends::ANYWHERE ? Ends::ONLY_AT_GAPS : otherwise;
}

// Blocks of at most `most` targets, or more where they may not end sooner.
std::vector<Run> join_tiles(const ClassView& view, const std::vector<Run>& tiles, int64_t most, Ends ends) {
    std::vector<Run> blocks;
    const std::vector<int64_t> begins = segments_of(view);
    const int64_t pieces = ceil_div(view.targets, most);
    size_t s = 0;
    for (size_t t = 0; t < tiles.size(); ++t) {
        const bool is_gap = begins[s + 1] <= tiles[t].begin;
        while (begins[s + 1] <= tiles[t].begin) ++s;
        const bool is_full = !blocks.empty() && (ends == Ends::EVENLY
                                 ? tiles[t].begin * pieces >= static_cast<int64_t>(blocks.size()) * view.targets
                                 : tiles[t].end - tiles[blocks.back().begin].begin > most);
        const bool opens = blocks.empty() || (ends == Ends::ONLY_AT_GAPS ? is_gap && is_full
                                              : ends == Ends::ALSO_AT_GAPS ? is_gap || is_full
                                                                           : is_full);
        if (opens) blocks.push_back({static_cast<int32_t>(t), static_cast<int32_t>(t)});
        blocks.back().end = static_cast<int32_t>(t + 1);
    }
    return blocks;
}

// The sources of each block of a class, in steps; of the first list.
std::vector<Run> frames_of(const ClassView& view, const std::vector<Run>& tiles, const std::vector<Run>& blocks) {
    std::vector<Run> frames;
    for (const Run& block : blocks) {
        const int64_t low = view.low(0, tiles[block.begin].begin), high = view.high(0, tiles[block.end - 1].end - 1);
        frames.push_back({static_cast<int32_t>(low), static_cast<int32_t>(std::max(low, high))});
    }
    return frames;
}

// Colours that blocks of an axis need, taken in turn, so that those of one colour share no source; 3 for more than 2.
int colours_of(const std::vector<Run>& frames) {
    const auto overlap = [&](size_t apart) {
        for (size_t i = apart; i < frames.size(); ++i)
            if (frames[i].begin < frames[i - apart].end) return true;
        return false;
    };
    return overlap(2) ? 3 : overlap(1) ? 2 : 1;
}

// What blocks of some size cost on an axis.
struct BlockSize {
    int64_t most;
    int colours;
    double blocks, sources, widest, targets;
    double in_sight;  // sources that a tile sees, the vectors' own rims included
};

std::vector<BlockSize> block_sizes(const ClassView& view, const Cutting& cutting, const std::vector<Run>& tiles, Ends ends) {
    double in_sight = 0;
    for (const auto& kind : kinds_of(view, cutting, tiles))
        in_sight = std::max<double>(in_sight, static_cast<double>(kind.first.second * cutting.unit));
    std::vector<BlockSize> sizes;
    int64_t last = -1;
    for (int64_t pieces : {1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 4096}) {
        const int64_t most = ceil_div(view.targets, pieces);
        if (most == last) continue;
        last = most;
        const std::vector<Run> blocks = join_tiles(view, tiles, most, ends);
        BlockSize size{most, colours_of(frames_of(view, tiles, blocks)), 0, 0, 0, 0, in_sight};
        for (const Run& block : blocks) {
            const int64_t begin = tiles[block.begin].begin, end = tiles[block.end - 1].end;
            double sources = 0;
            for (size_t list = 0; list < view.lists.size(); ++list)
                sources += std::max<int64_t>(view.high(list, end - 1) - view.low(list, begin), 0);
            size.blocks += 1;
            size.sources += sources;
            size.widest = std::max(size.widest, sources);
            size.targets = std::max<double>(size.targets, static_cast<double>(end - begin));
        }
        sizes.push_back(size);
        if (most == 1) break;
    }
    return sizes;
}

// Whether blocks are one plane of targets and take a part of each row: from row to row no machine sees by itself what
// comes next, and nothing is seen again from another plane.
bool is_strided(const BlockSize& planes, const BlockSize& columns) { return planes.targets == 1 && columns.blocks > 1; }

struct Blocking {
    int64_t most[AXES] = {1, 1, 1};
    bool is_found = false, is_far = false;
};

int64_t panel_of(const PlanRequest& request) {
    const int64_t usual = request.targets_in_lanes ? LARGE_PANEL_BYTES : PANEL_BYTES;
    return request.unit_bytes ? std::min(request.unit_bytes, usual) : usual;
}

Blocking choose_blocks(const PlanRequest& request, const std::vector<BlockSize>* sizes, double compute, double classes) {
    Blocking best;
    double least_cost = 1e300;
    const double pack = 1.0 + 0.4 * request.floats * 16 / request.lanes / 8;
    const double state = 4.0 * (request.value_dim + request.lanes), panel_bytes = static_cast<double>(panel_of(request));
    for (const BlockSize& a : sizes[0])
        for (const BlockSize& b : sizes[1])
            for (const BlockSize& c : sizes[2]) {
                const double blocks = a.blocks * b.blocks * c.blocks, targets = a.targets * b.targets * c.targets;
                // where there is one plane of targets, a panel need not hold more rows than a row of tiles sees
                const double rows = a.targets > 1 ? b.widest : std::min(b.widest, b.in_sight);
                const double bytes = a.widest * rows * c.widest * request.floats * 4;
                const double reach = (a.widest * b.widest * c.widest + targets) * 2 * request.token_bytes;
                double cost = a.sources * b.sources * c.sources * pack + blocks * 600;
                // heads take turns in a block, on the same pages
                if (reach > REACH_BYTES) cost *= 3;
                if (bytes > panel_bytes) {
                    if (targets * state > STATE_BYTES) continue;
                    cost += blocks * targets * std::ceil(bytes / panel_bytes) * (request.value_dim / 4.0 + 40);
                }
                const double units = blocks * classes * request.copies, shares = EVEN_SHARES;
                const double idle = std::ceil(units / shares) * shares / units - 1;
                cost += (compute + cost) * std::min(idle, 4.0) * 0.3;
                if (cost < least_cost) {
                    least_cost = cost;
                    best = {{a.most, b.most, c.most}, true, is_strided(a, c) && reach > NEAR_HEADS_BYTES};
                }
            }
    return best;
}

// Bytes per source of a unit that does its whole backward: keys twice, values, and the sums of both.
int64_t closed_bytes(const PlanRequest& request) {
    const int64_t key = ceil_div(request.key_dim, request.lanes) * request.lanes;
    const int64_t value = ceil_div(request.value_dim, request.lanes) * request.lanes;
    return (3 * key + 2 * value) * 4;
}

// What units cost beside their work on threads that wait for others: each colour is over when its last unit is. Counted
// for a few threads and for many, not for those there are.
double idle_cost(double units, double colours) {
    const auto waited = [&](double threads) {
        return std::min(std::ceil(units / colours / threads) * threads * colours / units - 1, 4.0);
    };
    return 0.3 * waited(4) + 0.05 * waited(8) + 0.02 * waited(32);
}

// The most sources that a tile sees.
double widest_tile(const ClassView& view, const std::vector<Run>& tiles) {
    int64_t most = 0;
    for (const Run& tile : tiles) most = std::max(most, view.high(0, tile.end - 1) - view.low(0, tile.begin));
    return static_cast<double>(most);
}

// Blocks for units that do their whole backward, where a row of tiles sees so many sources on the first two axes. What
// units share is packed, and its sums are written, by each of them, and so is a vector more in every row: 10 cycles a
// vector, fitted to times of blocks of many sizes.
Blocking choose_closed_blocks(const PlanRequest& request, const std::vector<BlockSize>* sizes, const double* seen,
                              const Shape& shape, double compute, double classes) {
    Blocking best;
    double least_cost = 1e300;
    const double bytes = static_cast<double>(closed_bytes(request)), pack = 10 * bytes / 4 / request.lanes;
    const double rim = static_cast<double>(shape.columns.unit);
    for (const BlockSize& a : sizes[0])
        for (const BlockSize& b : sizes[1])
            for (const BlockSize& c : sizes[2]) {
                if (std::max({a.colours, b.colours, c.colours}) > request.colours) continue;
                const double near = std::min(a.widest, seen[0]) * std::min(b.widest, seen[1]) * c.widest;
                const double all = a.widest * b.widest * c.widest;
                if (request.unit_bytes ? all * bytes > static_cast<double>(request.unit_bytes)
                                       : near * bytes > NEAR_BYTES || all * bytes > CLOSED_BYTES)
                    continue;
                const double blocks = a.blocks * b.blocks * c.blocks, colours = a.colours * b.colours * c.colours;
                const double packed = a.sources * b.sources * (c.sources + c.blocks * rim);
                const double idle = idle_cost(blocks * classes * request.copies, colours);
                if (idle > OTHER_WORK && (colours > 1 || all * bytes > NEAR_BYTES) && !request.unit_bytes) continue;
                const double cost = (BACKWARD_WORK * compute + packed * pack + blocks * 1500) * (1 + idle);
                if (cost >= least_cost) continue;
                least_cost = cost;
                const double targets = a.targets * b.targets * c.targets;
                const bool is_far = (all + targets) * 4 * request.token_bytes > NEAR_HEADS_BYTES;
                best = {{a.most, b.most, c.most}, true, is_strided(a, c) && is_far};
            }
    return best;
}

void fill_class(ClassAxis& to, const ClassView& view, const std::vector<SourceList>& lists, int axis, std::vector<Run> tiles,
                std::vector<Run> blocks) {
    to.tiles = std::move(tiles);
    to.blocks = std::move(blocks);
    const std::vector<int64_t> begins = segments_of(view);
    size_t s = 0;
    for (const Run& block : to.blocks) {
        while (begins[s + 1] <= to.tiles[block.begin].begin) ++s;
        for (size_t list = 0; list < lists.size(); ++list)
            to.anchors.push_back(static_cast<int32_t>(view.low(list, begins[s])));
    }
    to.numbers.resize(3 * lists.size());
    for (size_t list = 0; list < lists.size(); ++list) {
        const SourceAxis& source = lists[list].axis[axis];
        auto &low = to.numbers[3 * list], &high = to.numbers[3 * list + 1], &offset = to.numbers[3 * list + 2];
        for (int64_t target = 0; target < view.targets; ++target) {
            const int64_t at = view.first + view.step * target;
            low.push_back(source.low[at]);
            high.push_back(source.high[at]);
            offset.push_back(source.bias_offset[at]);
        }
        to.sources.push_back({low.data(), high.data(), offset.data(), source.first[view.first], source.step, source.turn});
    }
    to.axis = {static_cast<int32_t>(view.first), static_cast<int32_t>(view.step), static_cast<int32_t>(view.targets),
               static_cast<int32_t>(to.tiles.size()), static_cast<int32_t>(to.blocks.size()), to.tiles.data(),
               to.blocks.data(), to.anchors.data(), to.sources.data()};
}

}  // namespace

std::vector<SourceList> forward_lists(const std::vector<Member>& members, const Group& group) {
    std::vector<SourceList> lists;
    for (size_t m = 0; m < members.size(); ++m) {
        SourceList list;
        list.member = static_cast<int>(m);
        for (int a = 0; a < AXES; ++a)
            list.axis[a] = forward_axis(members[m].axis[a], group.takes_bias, group.bias_length[a]);
        lists.push_back(std::move(list));
    }
    return lists;
}

std::vector<SourceList> backward_lists(const std::vector<Member>& members, const Group& group) {
    std::vector<SourceList> lists;
    for (size_t m = 0; m < members.size(); ++m) {
        std::vector<SourceAxis> turns[AXES];
        for (int a = 0; a < AXES; ++a) {
            const AxisTable& table = members[m].axis[a];
            const int64_t reach = table.wraps ? 2 : 0;
            for (int64_t turn = -reach; turn <= reach; ++turn) {
                SourceAxis axis = backward_axis(table, turn, group.takes_bias, group.bias_length[a]);
                if (!table.wraps || !sees_nothing(axis)) turns[a].push_back(std::move(axis));
            }
        }
        for (const SourceAxis& a : turns[0])
            for (const SourceAxis& b : turns[1])
                for (const SourceAxis& c : turns[2]) lists.push_back({{a, b, c}, static_cast<int>(m)});
    }
    return lists;
}

std::vector<SourceList> extra_lists(const Member& member, int64_t tokens) {
    SourceList list;
    list.member = 0;
    for (int a = 0; a < AXES; ++a) {
        const int64_t targets = a == AXES - 1 ? tokens : 1;
        list.axis[a].low.assign(targets, 0);
        list.axis[a].high.assign(targets, static_cast<int32_t>(member.axis[a].queries));
        list.axis[a].first.assign(targets, 0);
        list.axis[a].bias_offset.assign(targets, 0);
    }
    return {list};
}

bool has_plain_centers(const std::vector<Member>& members) {
    for (const Member& member : members)
        for (const AxisTable& table : member.axis)
            for (int64_t query = 0; query < table.queries; ++query)
                if (table.center[query] != query) return false;
    return true;
}

namespace {

// The sources of one axis, class by class and block by block.
using AxisFrames = std::vector<std::vector<Run>>;

// Whether every source of an axis is in the frame of some block, and of blocks of one class only.
bool covers(const AxisFrames& frames, const std::vector<ClassAxis>& classes, int64_t sources) {
    std::vector<int64_t> owner(sources, -1);
    for (int64_t c = 0; c < static_cast<int64_t>(frames.size()); ++c) {
        const Interval& interval = classes[c].sources[0];
        if (interval.turn) return false;
        for (const Run& frame : frames[c])
            for (int64_t place = frame.begin; place < frame.end; ++place) {
                const int64_t at = interval.first + static_cast<int64_t>(interval.step) * place;
                if (at < 0 || at >= sources || (owner[at] != -1 && owner[at] != c)) return false;
                owner[at] = c;
            }
    }
    return std::find(owner.begin(), owner.end(), -1) == owner.end();
}

// Colours on each axis so that units of one colour share no source; 0 on the first where that cannot be, or where a
// source would be left out.
void choose_colours(const Plan& plan, const PlanRequest& request, const AxisFrames* frames, int* colours) {
    for (int a = 0; a < AXES; ++a) {
        colours[a] = 1;
        for (const std::vector<Run>& own : frames[a]) colours[a] = std::max(colours[a], colours_of(own));
        if (colours[a] > request.colours || !covers(frames[a], plan.classes[a], request.sources[plan.order[a]])) {
            colours[0] = 0;
            return;
        }
    }
}

// What a block shares with its neighbors, if those are of an earlier colour.
void note_shared(Unit& unit, int axis, const std::vector<Run>& frames, int block, int colour) {
    const bool is_last = block + 1 == static_cast<int>(frames.size());
    unit.shared_low[axis] = colour ? frames[block - 1].end : frames[block].begin;
    unit.shared_high[axis] = colour && !is_last ? frames[block + 1].begin : frames[block].end;
}

// Units of one class on each axis, by colour: block i of an axis has colour i modulo its colours.
void add_units(const ClassAxis* const* classes, const std::vector<Run>* const* frames, const int* colours,
               std::vector<std::vector<Unit>>& by_colour) {
    Unit unit;
    for (int a = 0; a < AXES; ++a) unit.axis[a] = &classes[a]->axis;
    for (int32_t i = 0; i < unit.axis[0]->num_blocks; ++i)
        for (int32_t j = 0; j < unit.axis[1]->num_blocks; ++j)
            for (int32_t k = 0; k < unit.axis[2]->num_blocks; ++k) {
                const int32_t block[AXES] = {i, j, k};
                int colour = 0;
                for (int a = 0; a < AXES; ++a) {
                    const int own = block[a] % colours[a];
                    unit.block[a] = block[a];
                    note_shared(unit, a, *frames[a], block[a], own);
                    colour = colour * colours[a] + own;
                }
                by_colour[colour].push_back(unit);
            }
}

void fill_units(Plan& plan, const AxisFrames* frames, const int* colours) {
    std::vector<std::vector<Unit>> by_colour(colours[0] * colours[1] * colours[2]);
    for (size_t a = 0; a < frames[0].size(); ++a)
        for (size_t b = 0; b < frames[1].size(); ++b)
            for (size_t c = 0; c < frames[2].size(); ++c) {
                const ClassAxis* const classes[AXES] = {&plan.classes[0][a], &plan.classes[1][b], &plan.classes[2][c]};
                const std::vector<Run>* const own[AXES] = {&frames[0][a], &frames[1][b], &frames[2][c]};
                add_units(classes, own, colours, by_colour);
            }
    plan.colours.push_back(0);
    for (const std::vector<Unit>& units : by_colour) {
        plan.units.insert(plan.units.end(), units.begin(), units.end());
        plan.colours.push_back(static_cast<int64_t>(plan.units.size()));
    }
}

}  // namespace

std::shared_ptr<const Plan> make_plan(const PlanRequest& request) {
    auto plan = std::make_shared<Plan>();
    // axes where everybody sees one source stand first: there is nothing to tile there
    int place = 0;
    for (bool narrow : {true, false})
        for (int a = 0; a < AXES; ++a)
            if ((widest(request.lists, a) <= 1) == narrow) plan->order[place++] = a;
    Bounds bounds[AXES];
    int64_t step[AXES];
    for (int a = 0; a < AXES; ++a) {
        const int64_t targets = request.targets[plan->order[a]];
        step[a] = 1;
        for (const SourceList& list : request.lists) {
            bounds[a].push_back(&list.axis[plan->order[a]]);
            // more classes than targets say no more, and the steps of many members may multiply beyond all numbers
            step[a] = std::min(std::lcm(step[a], static_cast<int64_t>(list.axis[plan->order[a]].step)), targets);
        }
    }
    const auto view = [&](int a, int64_t residue) {
        const int64_t targets = request.targets[plan->order[a]];
        return ClassView{bounds[a], residue, step[a], (targets - residue + step[a] - 1) / step[a]};
    };
    const ClassView planes = view(0, 0), rows = view(1, 0), columns = view(2, 0);
    const Shape shape = request.targets_in_lanes
                            ? choose_shape_in_lanes(request, some_of(rows), some_of(columns))
                            : choose_shape(request, some_of(rows), some_of(columns), widest(request.lists, plan->order[1]));
    plan->rows_per_vector = shape.rows_per_vector;
    plan->tile_rows = static_cast<int>(shape.rows.most);
    plan->tile_columns = static_cast<int>(shape.columns.most);
    plan->panel_bytes = panel_of(request);
    const Cutting plane_cut{1, false, 1, 1.0, 0.0, false};
    const Cutting cuts[AXES] = {plane_cut, shape.rows, shape.columns};
    // vectors of several rows are aligned to the windows' own rows
    Ends ends[AXES] = {Ends::ANYWHERE, shape.rows_per_vector > 1 ? Ends::ALSO_AT_GAPS : Ends::ANYWHERE, Ends::ANYWHERE};
    const ClassView* firsts[AXES] = {&planes, &rows, &columns};
    if (request.colours)
        for (int a = 0; a < AXES; ++a) ends[a] = closed_ends(*firsts[a], ends[a]);
    std::vector<BlockSize> sizes[AXES];
    double classes = 1, seen[AXES];
    for (int a = 0; a < AXES; ++a) {
        const std::vector<Run> tiles = cut_class(*firsts[a], cuts[a]);
        sizes[a] = block_sizes(*firsts[a], cuts[a], tiles, ends[a]);
        seen[a] = widest_tile(*firsts[a], tiles);
        classes *= static_cast<double>(std::min(step[a], request.targets[plan->order[a]]));
    }
    double seen_planes = 0;
    for (int64_t p = 0; p < planes.targets; ++p) seen_planes += static_cast<double>(planes.high(0, p) - planes.low(0, p));
    const double share = static_cast<double>(some_of(rows).targets) * some_of(columns).targets /
                         (static_cast<double>(rows.targets) * columns.targets);
    const double compute = shape.cost / share * seen_planes;
    const Blocking blocking = request.colours ? choose_closed_blocks(request, sizes, seen, shape, compute, classes)
                                              : choose_blocks(request, sizes, compute, classes);
    plan->is_far = blocking.is_far;
    AxisFrames frames[AXES];
    for (int a = 0; a < AXES; ++a) {
        const int64_t residues = std::min(step[a], request.targets[plan->order[a]]);
        plan->classes[a].resize(residues);
        for (int64_t residue = 0; residue < residues; ++residue) {
            const ClassView own = view(a, residue);
            std::vector<Run> tiles = cut_class(own, cuts[a]);
            std::vector<Run> blocks = join_tiles(own, tiles, blocking.most[a], ends[a]);
            frames[a].push_back(frames_of(own, tiles, blocks));
            fill_class(plan->classes[a][residue], own, request.lists, plan->order[a], std::move(tiles), std::move(blocks));
        }
    }
    int colours[AXES] = {0, 1, 1};
    const bool may_close = request.colours && request.lists.size() == 1 && blocking.is_found;
    if (may_close) choose_colours(*plan, request, frames, colours);
    plan->is_closed = colours[0] > 0;
    if (!plan->is_closed) colours[0] = colours[1] = colours[2] = 1;
    fill_units(*plan, frames, colours);
    for (const SourceList& list : request.lists) plan->member_of_list.push_back(list.member);
    plan->tiles = plan->computed = 0;
    for (const ClassAxis& a : plan->classes[0])
        for (const ClassAxis& b : plan->classes[1])
            for (const ClassAxis& c : plan->classes[2])
                plan->tiles += static_cast<int64_t>(a.tiles.size()) * b.tiles.size() * c.tiles.size();
    // what is computed is a product over the axes, list by list
    for (size_t list = 0; list < request.lists.size(); ++list) {
        int64_t computed[AXES] = {0, 0, 0};
        for (int a = 0; a < AXES; ++a)
            for (int64_t residue = 0; residue < static_cast<int64_t>(plan->classes[a].size()); ++residue) {
                const Bounds own{bounds[a][list]};
                const ClassView one{own, residue, step[a], plan->classes[a][residue].axis.targets};
                const std::vector<int64_t> begins = segments_of(one);
                size_t s = 0;
                for (const Run& tile : plan->classes[a][residue].tiles) {
                    while (begins[s + 1] <= tile.begin) ++s;
                    computed[a] += (tile.end - tile.begin) * cuts[a].unit *
                                   vectors_of(one, cuts[a], begins[s], tile.begin, tile.end);
                }
            }
        plan->computed += computed[0] * computed[1] * computed[2];
    }
    return plan;
}

}  // namespace vicinal
