// Reading a call: everything that a kernel will use as an index is checked here, and nothing is checked later.

#include "problem.h"

#include <cmath>

namespace vicinal {
namespace {

constexpr int64_t MOST_BYTES = int64_t(1) << 47;  // what a process can address; keeps sums of offsets from overflowing
constexpr int64_t MOST_MEMBERS = 4096;
constexpr int64_t MOST_CHANNELS = int64_t(1) << 24;  // an input of stride 0 could have any number
constexpr int HEADER = 4;

[[noreturn]] void refuse(const std::string& sentence) { throw BadArgument(sentence); }

std::string of(int64_t number) { return std::to_string(number); }

// The product of sizes, none of them negative.
int64_t product(const std::string& name, const int64_t* sizes, int count) {
    int64_t result = 1;
    for (int i = 0; i < count; ++i)
        if (sizes[i] == 0) return 0;
    for (int i = 0; i < count; ++i) {
        if (result > MOST_BYTES / sizes[i]) refuse(name + " has more elements than memory can hold");
        result *= sizes[i];
    }
    return result;
}

void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high)
        refuse(std::string(name) + " must be in " + of(low) + ".." + of(high) + ", got " + of(value));
}

void check_sizes(const vicinal_call& call) {
    if (call.version != VICINAL_ABI) refuse("version must be " + of(VICINAL_ABI) + ", got " + of(call.version));
    check_range("dtype", call.dtype, VICINAL_FLOAT32, VICINAL_FLOAT64);
    check_range("rank", call.rank, 1, AXES);
    check_range("batch", call.batch, 0, MOST_BYTES);
    check_range("heads", call.heads, 1, MOST_BYTES);
    check_range("kv_heads", call.kv_heads, 1, call.heads);
    if (call.heads % call.kv_heads)
        refuse("kv_heads must divide heads, got " + of(call.kv_heads) + " and " + of(call.heads));
    check_range("head_dim", call.head_dim, 1, MOST_CHANNELS);
    check_range("value_dim", call.value_dim, 0, MOST_CHANNELS);
    check_range("extra_tokens", call.extra_tokens, 0, INT32_MAX);
    for (int64_t axis = 0; axis < call.rank; ++axis) {
        check_range("grid", call.grid[axis], 1, INT32_MAX);
        check_range("key_grid", call.key_grid[axis], 1, INT32_MAX);
    }
    check_range("threads", call.threads, 1, INT32_MAX);
    check_range("strategy", call.strategy, VICINAL_AUTO, VICINAL_DENSE);
    check_range("isa", call.isa, VICINAL_BEST, VICINAL_AMX);
    if (!std::isfinite(call.scale)) refuse("scale must be finite");
}

// A pointer to whole numbers or to a vector, checked to be there and aligned.
template <typename T>
const T* pointer(const char* name, int64_t address, int64_t count) {
    if (count == 0) return nullptr;
    if (address == 0) refuse(std::string(name) + " is missing");
    if (address % int64_t(alignof(T))) refuse(std::string(name) + " is not aligned to its elements");
    return reinterpret_cast<const T*>(static_cast<intptr_t>(address));
}

// ---- the layout and the tables -------------------------------------------------------------------------------------

struct AxisLayout {
    int64_t step, wraps, most;
};

struct Layout {
    std::vector<Group> groups;
    std::vector<std::vector<AxisLayout>> members;  // of each group: its members' axes, one after the other
    int64_t records = 0;                           // members of all groups
};

class Numbers {
   public:
    Numbers(const int64_t* numbers, int64_t count) : next_(numbers), left_(count) {}
    int64_t take(const char* name, int64_t low, int64_t high) {
        if (left_ == 0) refuse("layout ends too early: layout_words is too small");
        --left_;
        int64_t number = *next_++;
        check_range(name, number, low, high);
        return number;
    }
    int64_t left() const { return left_; }

   private:
    const int64_t* next_;
    int64_t left_;
};

Group read_group(Numbers& numbers, const Problem& problem, const Group* last, std::vector<AxisLayout>& axes) {
    const int64_t rank = problem.call.rank;
    Group group;
    group.first_head = last ? last->first_head + last->heads : 0;
    group.heads = numbers.take("the heads of a group in layout", 1, problem.call.heads);
    int64_t members = numbers.take("the members of a group in layout", 1, MOST_MEMBERS);
    int64_t given = 0;
    for (int axis = 0; axis < AXES; ++axis) group.bias_length[axis] = 1;
    for (int64_t axis = 0; axis < rank; ++axis) {
        int64_t length = numbers.take("a bias length in layout", 0, INT32_MAX);
        if (length && length % 2 == 0) refuse("a bias length in layout must be odd, got " + of(length));
        given += length > 0;
        group.bias_length[AXES - rank + axis] = length ? length : 1;
    }
    if (given && given != rank) refuse("the bias lengths of a group in layout must be all 0 or all positive");
    group.takes_bias = given > 0;
    if (group.takes_bias && members != 1) refuse("a group with several members takes no bias");
    int64_t sizes[] = {group.heads, group.bias_length[0], group.bias_length[1], group.bias_length[2]};
    int64_t words = group.takes_bias ? product("bias", sizes, 4) : 0;
    group.bias_begin = last ? last->bias_begin : 0;
    if (last && last->takes_bias)
        group.bias_begin += last->heads * last->bias_length[0] * last->bias_length[1] * last->bias_length[2];
    if (group.bias_begin > MOST_BYTES - words) refuse("bias has more elements than memory can hold");
    for (int64_t record = 0; record < members * rank; ++record) {
        AxisLayout axis;
        axis.step = numbers.take("a step in layout", 0, INT32_MAX);
        axis.wraps = numbers.take("a wrapping flag in layout", 0, 1);
        axis.most = numbers.take("a largest count in layout", 0, INT32_MAX);
        axes.push_back(axis);
    }
    return group;
}

Layout read_layout(const Problem& problem) {
    const vicinal_call& call = problem.call;
    check_range("layout_words", call.layout_words, 2, int64_t(1) << 32);
    Numbers numbers(pointer<int64_t>("layout", call.layout, call.layout_words), call.layout_words);
    Layout layout;
    int64_t rank = numbers.take("the rank in layout", 1, AXES);
    if (rank != call.rank) refuse("layout is of rank " + of(rank) + ", the call of rank " + of(call.rank));
    int64_t groups = numbers.take("the number of groups in layout", 1, call.heads);
    for (int64_t index = 0; index < groups; ++index) {
        std::vector<AxisLayout> axes;
        const Group* last = layout.groups.empty() ? nullptr : &layout.groups.back();
        Group group = read_group(numbers, problem, last, axes);
        layout.groups.push_back(group);
        layout.records += int64_t(axes.size()) / rank;
        layout.members.push_back(std::move(axes));
        if (group.first_head + group.heads > call.heads) break;
    }
    const Group& last = layout.groups.back();
    if (last.first_head + last.heads != call.heads || int64_t(layout.groups.size()) != groups)
        refuse("the groups of layout must have " + of(call.heads) + " heads together");
    if (numbers.left()) refuse("layout_words is " + of(numbers.left()) + " more than layout needs");
    return layout;
}

[[noreturn]] void refuse_table(const std::string& what, int64_t axis, int64_t query) {
    refuse("tables: " + what + " at query " + of(query) + " of axis " + of(axis));
}

// What every consumer of a table builds on; see src/vicinal/pattern/table.py.
void check_axis(const AxisTable& table, const AxisLayout& layout, int64_t axis, int64_t bias_length) {
    const int64_t step = table.step, length = table.length;
    if (table.wraps && length % step) refuse("tables: a wrapping axis must be a multiple of its step long");
    for (int64_t query = 0; query < table.queries; ++query) {
        const int64_t start = table.start[query], count = table.count[query], last = start + step * (count - 1);
        if (count < 0 || count > layout.most) refuse_table("a count is not in 0..most", axis, query);
        if (query >= step) {
            const int64_t before = table.start[query - step], last_before = before + step * (table.count[query - step] - 1);
            if (start < before || last < last_before) refuse_table("keys decrease", axis, query);
            if ((start - before) % step) refuse_table("starts of one residue class differ modulo step", axis, query);
        }
        if (table.wraps) {
            if (start < -length || start >= 2 * length) refuse_table("a start is over one turn away", axis, query);
            if (count * step > length) refuse_table("a key is seen twice", axis, query);
        } else if (count > 0 && (start < 0 || last >= length)) {
            refuse_table("keys lie outside the axis", axis, query);
        }
        if (bias_length && count > 0) {
            const int64_t first = start - table.center[query], reach = step * (bias_length / 2);
            if (first % step || first < -reach || first + step * (count - 1) > reach)
                refuse_table("keys lie outside the bias table", axis, query);
        }
    }
}

AxisTable read_axis(const int32_t* words, const AxisLayout& layout, int64_t grid, int64_t key_grid) {
    AxisTable table;
    table.step = words[0];
    table.length = words[1];
    table.wraps = words[2] != 0;
    table.queries = words[3];
    table.start = words + HEADER;
    table.count = table.start + grid;
    table.center = table.count + grid;
    check_range("a step in tables", table.step, 1, INT32_MAX);
    if (layout.step && layout.step != table.step)
        refuse("a step in tables is " + of(table.step) + ", in layout " + of(layout.step));
    check_range("a wrapping flag in tables", words[2], 0, 1);
    if (words[2] != layout.wraps) refuse("a wrapping flag in tables differs from layout");
    check_range("a number of queries in tables", table.queries, 1, grid);
    check_range("a number of keys in tables", table.length, 1, key_grid);
    return table;
}

// A missing axis: one query that sees one key.
AxisTable lone_axis() {
    static const int32_t zero = 0, one = 1;
    return {1, 1, 1, false, &zero, &one, &zero};
}

std::vector<std::vector<Member>> read_row(const int32_t* words, const Layout& layout, const Problem& problem) {
    const int64_t rank = problem.call.rank;
    std::vector<std::vector<Member>> groups(layout.groups.size());
    const Member* first = nullptr;
    for (size_t index = 0; index < groups.size(); ++index) {
        const std::vector<AxisLayout>& axes = layout.members[index];
        const Group& group = layout.groups[index];
        groups[index].resize(axes.size() / rank);
        for (size_t number = 0; number < groups[index].size(); ++number) {
            Member& member = groups[index][number];
            for (int axis = 0; axis < AXES - rank; ++axis) member.axis[axis] = lone_axis();
            for (int64_t axis = 0; axis < rank; ++axis) {
                const int64_t padded = AXES - rank + axis;
                const AxisLayout& about = axes[number * rank + axis];
                AxisTable table = read_axis(words, about, problem.grid[padded], problem.key_grid[padded]);
                check_axis(table, about, axis, problem.call.bias_words ? group.bias_length[padded] : 0);
                words += HEADER + 3 * problem.grid[padded];
                member.axis[padded] = table;
                if (!first) continue;
                const AxisTable& other = first->axis[padded];
                if (table.queries != other.queries || table.length != other.length)
                    refuse("tables: all groups and members of a sample must have the same queries and keys");
            }
            if (!first) first = &member;
        }
    }
    return groups;
}

void read_tables(Problem& problem, const Layout& layout) {
    const vicinal_call& call = problem.call;
    int64_t words = 0;
    for (int64_t axis = 0; axis < call.rank; ++axis) words += HEADER + 3 * call.grid[axis];
    if (words > MOST_BYTES / layout.records) refuse("tables has more elements than memory can hold");
    words *= layout.records;
    if (call.table_words != words)
        refuse("table_words must be " + of(words) + " for this layout and grid, got " + of(call.table_words));
    if (call.table_rows != 1 && call.table_rows != call.batch)
        refuse("table_rows must be 1 or batch (" + of(call.batch) + "), got " + of(call.table_rows));
    int64_t sizes[] = {call.table_rows, words, int64_t(sizeof(int32_t))};
    product("tables", sizes, 3);
    const int32_t* tables = pointer<int32_t>("tables", call.tables, call.table_rows);
    problem.members.reserve(call.table_rows);
    for (int64_t row = 0; row < call.table_rows; ++row)
        problem.members.push_back(read_row(tables + row * words, layout, problem));
}

// ---- the tensors ---------------------------------------------------------------------------------------------------

enum class Role { INPUT, OUTPUT, OPTIONAL_INPUT, OPTIONAL_OUTPUT };

struct Shape {
    int64_t batch, axis[AXES], heads, channels;  // channels -1: the tensor has no such axis
    int64_t rank;                                // of the grid in the tensor
};

View read_view(const char* name, const vicinal_tensor& tensor, const Shape& shape, int64_t bytes, Role role) {
    const bool has_channels = shape.channels >= 0, is_output = role == Role::OUTPUT || role == Role::OPTIONAL_OUTPUT;
    int64_t sizes[6], count = 0;
    sizes[count++] = shape.batch;
    for (int64_t axis = AXES - shape.rank; axis < AXES; ++axis) sizes[count++] = shape.axis[axis];
    sizes[count++] = shape.heads;
    if (has_channels) sizes[count++] = shape.channels;
    const bool is_optional = role == Role::OPTIONAL_INPUT || role == Role::OPTIONAL_OUTPUT;
    View view;
    int64_t elements = product(name, sizes, int(count));
    if (elements > MOST_BYTES / bytes) refuse(std::string(name) + " has more elements than memory can hold");
    if (elements == 0 || (is_optional && tensor.data == 0)) return view;
    if (tensor.data == 0) refuse(std::string(name) + " is missing");
    if (tensor.data % bytes) refuse(std::string(name) + " is not aligned to its elements");
    int64_t reach = 0;
    for (int64_t axis = 0; axis < count; ++axis) {
        if (sizes[axis] == 1) continue;
        const int64_t stride = tensor.strides[axis];
        if (stride < 0) refuse(std::string(name) + " has a negative stride");
        if (stride == 0 && is_output) refuse(std::string(name) + " is written but has a stride of 0");
        if (stride > MOST_BYTES / (sizes[axis] * bytes)) refuse(std::string(name) + " has a stride out of all memory");
        reach += stride * (sizes[axis] - 1) * bytes;
        if (reach > MOST_BYTES) refuse(std::string(name) + " has strides out of all memory");
    }
    view.data = reinterpret_cast<char*>(static_cast<intptr_t>(tensor.data));
    const int64_t* stride = tensor.strides;
    view.batch = *stride++;
    for (int64_t axis = AXES - shape.rank; axis < AXES; ++axis) view.axis[axis] = *stride++;
    view.head = *stride++;
    if (has_channels) view.channel = *stride;
    return view;
}

void check_contiguous(const char* name, const vicinal_tensor& tensor, const int64_t* sizes, int64_t count) {
    int64_t stride = 1;
    for (int64_t axis = count - 1; axis >= 0; --axis) {
        if (sizes[axis] != 1 && tensor.strides[axis] != stride) refuse(std::string(name) + " must be contiguous");
        stride *= sizes[axis];
    }
}

Shape query_shape(const Problem& problem, int64_t channels) {
    const int64_t* grid = problem.grid;
    return {problem.call.batch, {grid[0], grid[1], grid[2]}, problem.call.heads, channels, problem.call.rank};
}

Shape key_shape(const Problem& problem, int64_t channels) {
    const int64_t* grid = problem.key_grid;
    return {problem.call.batch, {grid[0], grid[1], grid[2]}, problem.call.kv_heads, channels, problem.call.rank};
}

// Extra tokens lie along the last axis of the grid.
Shape extra_shape(const Problem& problem, int64_t channels) {
    return {problem.call.batch, {1, 1, problem.call.extra_tokens}, problem.call.kv_heads, channels, 1};
}

void read_inputs(Problem& problem, bool is_backward) {
    const vicinal_call& call = problem.call;
    const int64_t bytes = problem.element_bytes, wide = problem.is_double ? 8 : 4;
    const Shape query = query_shape(problem, call.head_dim), out = query_shape(problem, call.value_dim);
    const Shape rows = query_shape(problem, -1);
    problem.query = read_view("query", call.query, query, bytes, Role::INPUT);
    problem.key = read_view("key", call.key, key_shape(problem, call.head_dim), bytes, Role::INPUT);
    problem.value = read_view("value", call.value, key_shape(problem, call.value_dim), bytes, Role::INPUT);
    const Shape extra_key = extra_shape(problem, call.head_dim), extra_value = extra_shape(problem, call.value_dim);
    problem.extra_key = read_view("extra_key", call.extra_key, extra_key, bytes, Role::INPUT);
    problem.extra_value = read_view("extra_value", call.extra_value, extra_value, bytes, Role::INPUT);
    if (call.extra_lengths.data) {
        problem.extra_lengths = pointer<int64_t>("extra_lengths", call.extra_lengths.data, call.batch);
        check_contiguous("extra_lengths", call.extra_lengths, &call.batch, 1);
        for (int64_t sample = 0; sample < call.batch; ++sample)
            check_range("extra_lengths", problem.extra_lengths[sample], 0, call.extra_tokens);
    }
    problem.out = read_view("out", call.out, out, bytes, is_backward ? Role::INPUT : Role::OUTPUT);
    problem.lse = read_view("lse", call.lse, rows, wide, is_backward ? Role::INPUT : Role::OPTIONAL_OUTPUT);
}

void read_gradients(Problem& problem) {
    const vicinal_call& call = problem.call;
    const int64_t bytes = problem.element_bytes, wide = problem.is_double ? 8 : 4;
    const Shape query = query_shape(problem, call.head_dim), out = query_shape(problem, call.value_dim);
    const Shape rows = query_shape(problem, -1), key = key_shape(problem, call.head_dim);
    const Shape value = key_shape(problem, call.value_dim);
    problem.grad_out = read_view("grad_out", call.grad_out, out, bytes, Role::OPTIONAL_INPUT);
    problem.grad_lse = read_view("grad_lse", call.grad_lse, rows, wide, Role::OPTIONAL_INPUT);
    problem.grad_query = read_view("grad_query", call.grad_query, query, bytes, Role::OPTIONAL_OUTPUT);
    problem.grad_key = read_view("grad_key", call.grad_key, key, bytes, Role::OPTIONAL_OUTPUT);
    problem.grad_value = read_view("grad_value", call.grad_value, value, bytes, Role::OPTIONAL_OUTPUT);
    const Shape extra_key = extra_shape(problem, call.head_dim), extra_value = extra_shape(problem, call.value_dim);
    problem.grad_extra_key =
        read_view("grad_extra_key", call.grad_extra_key, extra_key, bytes, Role::OPTIONAL_OUTPUT);
    problem.grad_extra_value =
        read_view("grad_extra_value", call.grad_extra_value, extra_value, bytes, Role::OPTIONAL_OUTPUT);
}

template <typename T>
void read_bias_as(Problem& problem, bool is_backward) {
    const vicinal_call& call = problem.call;
    if (call.bias_words == 0) {
        if (call.bias.data) refuse("bias is given, but bias_words is 0");
    } else {
        problem.bias = pointer<T>("bias", call.bias.data, call.bias_words);
        check_contiguous("bias", call.bias, &call.bias_words, 1);
    }
    if (!is_backward || !call.grad_bias.data) return;
    if (call.bias_words == 0) refuse("grad_bias is given, but there is no bias");
    problem.grad_bias = const_cast<T*>(pointer<T>("grad_bias", call.grad_bias.data, call.bias_words));
    check_contiguous("grad_bias", call.grad_bias, &call.bias_words, 1);
}

void check_bias_words(const Problem& problem) {
    const int64_t given = problem.call.bias_words;
    check_range("bias_words", given, 0, MOST_BYTES);
    if (given == 0) return;
    for (const Group& group : problem.groups)
        if (!group.takes_bias) refuse("bias_words must be 0 where a head group takes no bias, got " + of(given));
    const Group& last = problem.groups.back();
    const int64_t* length = last.bias_length;
    const int64_t words = last.bias_begin + last.heads * length[0] * length[1] * length[2];
    if (given != words) refuse("bias_words must be " + of(words) + " for this layout, got " + of(given));
}

}  // namespace

Problem read_problem(const vicinal_call& call, Purpose purpose) {
    check_sizes(call);
    Problem problem;
    problem.call = call;
    problem.is_double = call.dtype == VICINAL_FLOAT64;
    problem.element_bytes = problem.is_double ? 8 : call.dtype == VICINAL_FLOAT32 ? 4 : 2;
    for (int axis = 0; axis < AXES; ++axis) {
        const int64_t given = axis - (AXES - call.rank);
        problem.grid[axis] = given < 0 ? 1 : call.grid[given];
        problem.key_grid[axis] = given < 0 ? 1 : call.key_grid[given];
    }
    Layout layout = read_layout(problem);
    problem.groups = layout.groups;
    check_bias_words(problem);
    if (purpose != Purpose::DESCRIBE) {
        const bool is_backward = purpose == Purpose::BACKWARD;
        read_inputs(problem, is_backward);
        if (is_backward) read_gradients(problem);
        if (problem.is_double)
            read_bias_as<double>(problem, is_backward);
        else
            read_bias_as<float>(problem, is_backward);
    }
    read_tables(problem, layout);
    return problem;
}

}  // namespace vicinal
