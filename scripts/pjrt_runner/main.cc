// Generates token ids from token ids with a folder of `jaxllm export SOURCE FOLDER --runner`, by a
// PJRT plugin and nothing else: no Python, no jax.
//
//   pjrt_runner FOLDER --plugin xla_cuda_plugin.so --prompt 1,2,3 --max-tokens 64
//
// Prints the new ids on one line; times go to stderr.

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <optional>

#include "pjrt.h"

namespace {

constexpr char kUsage[] =
    "usage: pjrt_runner FOLDER --plugin FILE.so --prompt IDS|--build [options]\n"
    "  --prompt IDS       token ids, commas between them\n"
    "  --max-tokens N     at most this many new tokens (64)\n"
    "  --native           keep executables in FOLDER/native and load them from there: they are machine\n"
    "                     code, so FOLDER must be your own\n"
    "  --build            make all executables of FOLDER/native and run none\n"
    "  --option NAME=V    of the plugin's client, such as memory_fraction=0.5 or preallocate=false;\n"
    "                     may be given several times\n"
    "  --ignore-end       go on past an end token\n";

struct Options {
  std::string folder, plugin;
  std::vector<int32_t> prompt;
  int64_t max_tokens = 64;
  bool native = false, build = false, ignore_end = false;
  std::vector<std::pair<std::string, std::string>> client;
};

int64_t whole(const std::string& text, const std::string& what) {
  size_t used = 0;
  int64_t value = 0;
  try {
    value = std::stoll(text, &used);
  } catch (const std::exception&) {
    used = std::string::npos;
  }
  need(!text.empty() && used == text.size(), what + ": '" + text + "' is no whole number");
  return value;
}

Options parse(int count, char** words) {
  Options options;
  for (int i = 1; i < count; ++i) {
    std::string word = words[i];
    auto value = [&]() -> std::string {
      need(i + 1 < count, word + " wants a value");
      return words[++i];
    };
    if (word == "--plugin") {
      options.plugin = value();
    } else if (word == "--prompt") {
      std::istringstream ids(value());
      for (std::string id; std::getline(ids, id, ',');) {
        options.prompt.push_back(static_cast<int32_t>(whole(id, "--prompt")));
      }
    } else if (word == "--max-tokens") {
      options.max_tokens = whole(value(), word);
    } else if (word == "--native") {
      options.native = true;
    } else if (word == "--build") {
      options.native = options.build = true;
    } else if (word == "--ignore-end") {
      options.ignore_end = true;
    } else if (word == "--option") {
      std::string pair = value();
      size_t middle = pair.find('=');
      need(middle != std::string::npos && middle > 0, "--option wants NAME=VALUE, found " + pair);
      options.client.emplace_back(pair.substr(0, middle), pair.substr(middle + 1));
    } else {
      need(word.rfind("--", 0) != 0, "unknown option " + word + "\n" + kUsage);
      need(options.folder.empty(), "one folder, not two\n" + std::string(kUsage));
      options.folder = word;
    }
  }
  bool told = options.build != !options.prompt.empty();
  need(!options.folder.empty() && !options.plugin.empty() && told, kUsage);
  need(options.max_tokens >= 1, "--max-tokens is at least 1");
  return options;
}

// A client's option: true, false, a whole number, a number, else a text.
PJRT_NamedValue named(const std::pair<std::string, std::string>& option) {
  PJRT_ARGS(PJRT_NamedValue, value);
  const std::string& text = option.second;
  value.name = option.first.data();
  value.name_size = option.first.size();
  value.value_size = 1;
  char* end = nullptr;
  if (text == "true" || text == "false") {
    value.type = PJRT_NamedValue_kBool;
    value.bool_value = text == "true";
  } else if (int64_t number = std::strtoll(text.c_str(), &end, 10); !text.empty() && *end == 0) {
    value.type = PJRT_NamedValue_kInt64;
    value.int64_value = number;
  } else if (float real = std::strtof(text.c_str(), &end); !text.empty() && *end == 0) {
    value.type = PJRT_NamedValue_kFloat;
    value.float_value = real;
  } else {
    value.type = PJRT_NamedValue_kString;
    value.string_value = text.data();
    value.value_size = text.size();
  }
  return value;
}

double now_ms() {
  auto time = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::milli>(time).count();
}

class Runner {
 public:
  Runner(Folder& folder, const Device& device, bool native)
      : folder_(folder), device_(device), native_(native) {
    const std::string wanted = folder.platform();
    bool same = device.platform() == wanted || (wanted == "cuda" && device.platform() == "gpu");
    need(same, "the folder is for " + wanted + ", the plugin for " + device.platform());
  }

  void build() {
    for (const Program& program : folder_.programs()) ready(program);
  }

  void load() {
    for (const Parameter& p : folder_.parameters()) {
      weights_.push_back(device_.put(folder_.bytes(p), buffer_type(p.dtype), p.dims, true));
    }
  }

  // Calls `take` with the new ids, a few at a time, until it wants no more.
  template <typename Take>
  void generate(const std::vector<int32_t>& prompt, int64_t max_tokens, Take take) {
    int64_t length = static_cast<int64_t>(prompt.size()), context = folder_.context();
    need(length < context, "a prompt has at most " + std::to_string(context - 1) + " tokens here");
    for (int32_t id : prompt) {
      need(id >= 0 && id < folder_.vocab(), "id " + std::to_string(id) + " is not in the vocabulary of " +
                                                std::to_string(folder_.vocab()));
    }
    int64_t limit = std::min(max_tokens, context - length);
    prefill(prompt);
    if (!take(device_.get(tail_[0])) || limit == 1) return;
    // The next call is on its way before the last one's ids are read.
    std::optional<std::pair<Buffer, int64_t>> pending;
    for (int64_t done = 1; done < limit || pending;) {
      std::optional<std::pair<Buffer, int64_t>> next;
      if (done < limit) {
        grow(length + done + decode_tokens() - 1);
        const Program& program = find("decode", 0, capacity_);
        Buffers results = call(program, {weights_, state_, tail_});
        Buffer drawn = results.back();
        results.pop_back();
        keep(results);
        int64_t used = std::min(program.tokens, limit - done);
        next = {drawn, used};
        done += used;
      }
      if (pending) {
        std::vector<int32_t> ids = device_.get(pending->first);
        ids.resize(static_cast<size_t>(pending->second));
        if (!take(ids)) return;
      }
      pending = next;
    }
  }

  double building_ms() const { return building_ms_; }

 private:
  void prefill(const std::vector<int32_t>& prompt) {
    int64_t length = static_cast<int64_t>(prompt.size());
    const Program* first = nullptr;
    for (const Program& p : folder_.programs()) {
      if (p.kind == "prefill" && (first == nullptr || first->tokens < length)) first = &p;
    }
    need(first != nullptr, "the folder has no program for prompts");
    int64_t size = first->tokens;
    capacity_ = first->capacity;
    for (int64_t start = 0; start < length; start += size) {
      std::vector<int32_t> ids(static_cast<size_t>(size), 0);
      int64_t real = std::min(size, length - start);
      std::copy_n(prompt.begin() + start, real, ids.begin());
      Buffers fresh = {device_.put(ids, {1, size}), device_.put({static_cast<int32_t>(real)}, {1})};
      if (start == 0) {
        keep(call(*first, {weights_, fresh}));
      } else {
        grow(start + size);
        keep(call(find("extend", size, capacity_), {weights_, state_, tail_, fresh}));
      }
    }
  }

  // The state with room for `tokens` tokens, as far as the programs go.
  void grow(int64_t tokens) {
    while (capacity_ < tokens) {
      const Program* wider = maybe("grow", 0, capacity_);
      if (wider == nullptr) return;
      state_ = call(*wider, {state_});
      capacity_ = wider->tokens;
    }
  }

  void keep(Buffers results) {
    need(results.size() > 2, "a program gave no state");
    tail_.assign(results.end() - 2, results.end());
    results.resize(results.size() - 2);
    state_ = std::move(results);
  }

  int64_t decode_tokens() { return find("decode", 0, capacity_).tokens; }

  const Program* maybe(const std::string& kind, int64_t tokens, int64_t capacity) const {
    for (const Program& p : folder_.programs()) {
      if (p.kind == kind && p.capacity == capacity && (tokens == 0 || p.tokens == tokens)) return &p;
    }
    return nullptr;
  }

  const Program& find(const std::string& kind, int64_t tokens, int64_t capacity) const {
    const Program* found = maybe(kind, tokens, capacity);
    need(found != nullptr, "the folder has no " + kind + " for " + std::to_string(capacity) + " slots");
    return *found;
  }

  Buffers call(const Program& program, const std::vector<Buffers>& groups) {
    Buffers arguments;
    size_t index = 0;
    for (const Buffers& group : groups) {
      for (const Buffer& buffer : group) {
        if (program.dropped.count(index++) == 0) arguments.push_back(buffer);
      }
    }
    return ready(program).run(arguments);
  }

  const Executable& ready(const Program& program) {
    auto found = ready_.find(program.name);
    if (found != ready_.end()) return found->second;
    double start = now_ms();
    Executable made = native_ ? kept(program) : compiled(program);
    building_ms_ += now_ms() - start;
    return ready_.emplace(program.name, made).first->second;
  }

  Executable compiled(const Program& program) const {
    return Executable::compile(device_, folder_.text(program.file), folder_.text("compile_options.pb"));
  }

  // From FOLDER/native, where the first line says for which plugin and program it was made.
  Executable kept(const Program& program) const {
    std::string file = folder_.at("native/" + program.name + ".exe");
    std::string head = device_.platform() + " " + one_line(device_.version()) + " " + print(program) + "\n";
    std::ifstream stream(file, std::ios::binary);
    std::string content((std::istreambuf_iterator<char>(stream)), {});
    if (content.compare(0, head.size(), head) == 0) return Executable::load(device_, content.substr(head.size()));
    Executable made = compiled(program);
    mkdir(folder_.at("native").c_str(), 0700);
    std::string part = file + ".part" + std::to_string(getpid());
    std::ofstream out(part, std::ios::binary);
    out << head << made.serialize();
    out.close();
    need(out.good() && std::rename(part.c_str(), file.c_str()) == 0, file + " cannot be written");
    return made;
  }

  static std::string one_line(std::string text) {
    for (char& letter : text) letter = std::isspace(static_cast<unsigned char>(letter)) ? '_' : letter;
    return text;
  }

  // FNV-1a of a program and its options: tells programs apart, protects from nobody.
  std::string print(const Program& program) const {
    uint64_t hash = 14695981039346656037ull;
    for (const std::string& text : {folder_.text(program.file), folder_.text("compile_options.pb")}) {
      for (unsigned char byte : text) hash = (hash ^ byte) * 1099511628211ull;
    }
    return std::to_string(hash);
  }

  Folder& folder_;
  const Device& device_;
  bool native_;
  Buffers weights_, state_, tail_;
  int64_t capacity_ = 0;
  double building_ms_ = 0;
  std::map<std::string, Executable> ready_;
};

void run(int count, char** words) {
  double start = now_ms();
  Options options = parse(count, words);
  Folder folder(options.folder);
  Plugin plugin(options.plugin);
  std::vector<PJRT_NamedValue> settings;
  for (const auto& option : options.client) settings.push_back(named(option));
  Device device(plugin, settings);
  double opened = now_ms();
  Runner runner(folder, device, options.native);
  if (options.build) {
    runner.build();
    std::fprintf(stderr, "{\"programs\": %zu, \"building_ms\": %.1f}\n", folder.programs().size(),
                 runner.building_ms());
    return;
  }
  runner.load();
  double loaded = now_ms(), first = 0, built = 0;
  int64_t printed = 0;
  runner.generate(options.prompt, options.max_tokens, [&](const std::vector<int32_t>& ids) {
    if (first == 0) first = now_ms(), built = runner.building_ms();
    for (int32_t id : ids) {
      std::cout << (printed++ ? " " : "") << id << std::flush;
      if (!options.ignore_end && folder.ends().count(id)) return false;
    }
    return true;
  });
  std::cout << std::endl;
  double decoding = now_ms() - first - (runner.building_ms() - built);
  std::fprintf(stderr,
               "{\"tokens\": %lld, \"open_ms\": %.1f, \"weights_ms\": %.1f, \"building_ms\": %.1f, "
               "\"first_token_ms\": %.1f, \"tokens_per_second\": %.1f}\n",
               static_cast<long long>(printed), opened - start, loaded - opened, runner.building_ms(),
               first - start, decoding > 0 && printed > 1 ? 1e3 * static_cast<double>(printed - 1) / decoding : 0.0);
}

}  // namespace

int main(int count, char** words) {
  try {
    run(count, words);
  } catch (const std::exception& error) {
    std::cout.flush();
    std::cerr << "pjrt_runner: " << error.what() << std::endl;
    return 2;
  }
  // Without the destructors of the plugin's threads: there is nothing left to save.
  std::cout.flush();
  std::_Exit(0);
}
