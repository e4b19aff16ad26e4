// What `jaxllm export SOURCE FOLDER --runner` wrote: a text manifest, programs, weights.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

[[noreturn]] inline void fail(const std::string& message) { throw std::runtime_error(message); }

inline void need(bool fine, const std::string& message) {
  if (!fine) fail(message);
}

// Bytes of one value of a dtype.
inline size_t value_bytes(const std::string& dtype) {
  static const std::map<std::string, size_t> sizes = {
      {"bool", 1},    {"int8", 1},     {"uint8", 1},   {"float8_e4m3fn", 1}, {"float16", 2},
      {"bfloat16", 2}, {"float32", 4}, {"int32", 4},   {"uint32", 4}};
  auto found = sizes.find(dtype);
  need(found != sizes.end(), "arrays of " + dtype + " are unknown to this runner");
  return found->second;
}

// A file mapped into memory for as long as the process lives.
class Mapped {
 public:
  explicit Mapped(const std::string& path) {
    int file = open(path.c_str(), O_RDONLY);
    need(file >= 0, path + ": cannot be read: " + std::strerror(errno));
    struct stat status {};
    bool known = fstat(file, &status) == 0;
    size_ = known ? static_cast<size_t>(status.st_size) : 0;
    void* data = size_ ? mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0) : MAP_FAILED;
    close(file);
    need(data != MAP_FAILED, path + ": is empty or cannot be mapped");
    data_ = static_cast<const char*>(data);
  }
  const char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  const char* data_ = nullptr;
  size_t size_ = 0;
};

// One array of the weights: `bytes` of a file from `offset` on, row-major.
struct Parameter {
  std::string name, file, dtype;
  size_t offset = 0, bytes = 0;
  std::vector<int64_t> dims;
};

// One program. `tokens` is what it takes (prefill, extend) or draws (decode), `capacity` the slots
// of the state that it makes (prefill) or takes. `dropped` are arguments that it does not want.
struct Program {
  std::string name, kind, file;
  int64_t tokens = 0, capacity = 0;
  std::set<size_t> dropped;
};

class Folder {
 public:
  explicit Folder(const std::string& path) : path_(path) {
    std::ifstream file(path + "/manifest.txt");
    need(file.good(), path + "/manifest.txt cannot be read: write the folder by jaxllm export --runner");
    std::string line, word;
    std::getline(file, line);
    need(line == "jaxllm-runner 1", path + ": has format '" + line + "', this reads 'jaxllm-runner 1'");
    for (size_t number = 2; std::getline(file, line); ++number) {
      std::istringstream words(line);
      if (!(words >> word)) continue;
      if (!read(word, words)) {
        fail(path + "/manifest.txt: line " + std::to_string(number) + " is damaged: " + line.substr(0, 60));
      }
    }
    need(ended_, path + "/manifest.txt is cut off: its last line is missing");
    check();
  }

  const std::string& platform() const { return platform_; }
  int64_t context() const { return context_; }
  int64_t vocab() const { return vocab_; }
  const std::set<int64_t>& ends() const { return ends_; }
  const std::vector<Parameter>& parameters() const { return parameters_; }
  const std::vector<Program>& programs() const { return programs_; }
  std::string at(const std::string& name) const { return path_ + "/" + name; }

  // The bytes of a parameter; files stay mapped.
  const char* bytes(const Parameter& parameter) {
    const Mapped& file = mapped(parameter.file);
    return file.data() + parameter.offset;
  }

  std::string text(const std::string& name) const {
    Mapped file(at(name));
    return std::string(file.data(), file.size());
  }

 private:
  bool read(const std::string& word, std::istringstream& words) {
    if (ended_) return false;
    if (word == "platform") return static_cast<bool>(words >> platform_);
    if (word == "context") return static_cast<bool>(words >> context_);
    if (word == "vocab") return static_cast<bool>(words >> vocab_);
    if (word == "made_by") return true;
    if (word == "ends_at") {
      for (int64_t id; words >> id;) ends_.insert(id);
      return words.eof();
    }
    if (word == "parameter") {
      Parameter p;
      if (!(words >> p.name >> p.file >> p.offset >> p.bytes >> p.dtype)) return false;
      for (int64_t dim; words >> dim;) p.dims.push_back(dim);
      parameters_.push_back(p);
      return words.eof() && inside(p.file);
    }
    if (word == "program") {
      Program p;
      if (!(words >> p.name >> p.kind >> p.tokens >> p.capacity >> p.file)) return false;
      for (size_t index; words >> index;) p.dropped.insert(index);
      programs_.push_back(p);
      return words.eof() && inside(p.file) && inside(p.name) && p.name.find('/') == std::string::npos;
    }
    ended_ = word == "end";
    return ended_;
  }

  static bool inside(const std::string& name) {
    return !name.empty() && name[0] != '/' && name.find("..") == std::string::npos;
  }

  void check() {
    need(!platform_.empty() && context_ > 1 && vocab_ > 0 && !programs_.empty() && !parameters_.empty(),
         path_ + "/manifest.txt lacks a platform, context, vocab, programs or parameters");
    for (const Parameter& p : parameters_) {
      size_t bytes = value_bytes(p.dtype);
      for (int64_t dim : p.dims) {
        bool fine = dim >= 0 && !__builtin_mul_overflow(bytes, static_cast<size_t>(dim), &bytes);
        need(fine, p.name + " has no shape that memory could hold");
      }
      need(bytes == p.bytes, p.name + " says " + std::to_string(p.bytes) + " bytes, its shape " + std::to_string(bytes));
      const Mapped& file = mapped(p.file);
      need(p.bytes <= file.size() && p.offset <= file.size() - p.bytes,
           at(p.file) + " is cut off: " + p.name + " lies at bytes " + std::to_string(p.offset) + " to " +
               std::to_string(p.offset + p.bytes) + " of " + std::to_string(file.size()));
    }
  }

  const Mapped& mapped(const std::string& name) {
    auto& file = files_[name];
    if (!file) file = std::make_unique<Mapped>(at(name));
    return *file;
  }

  std::string path_, platform_;
  int64_t context_ = 0, vocab_ = 0;
  bool ended_ = false;
  std::set<int64_t> ends_;
  std::vector<Parameter> parameters_;
  std::vector<Program> programs_;
  std::map<std::string, std::unique_ptr<Mapped>> files_;
};
