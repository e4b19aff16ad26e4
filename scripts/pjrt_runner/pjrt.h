// The PJRT C API in a few classes: a plugin's first device, buffers on it, programs for it.
#pragma once

#include <dlfcn.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "folder.h"
#include "xla/pjrt/c/pjrt_c_api.h"

// Arguments of a call, zero but for the size by which the plugin tells versions apart.
#define PJRT_ARGS(kind, name) \
  kind name {}; \
  name.struct_size = kind##_STRUCT_SIZE

// A plugin's table of functions.
class Plugin {
 public:
  explicit Plugin(const std::string& path) {
    // Never closed: plugins keep threads.
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) fail(std::string("the plugin cannot be loaded: ") + dlerror());
    auto get = reinterpret_cast<const PJRT_Api* (*)()>(dlsym(library, "GetPjrtApi"));
    need(get != nullptr, path + " is no PJRT plugin: it has no GetPjrtApi");
    api_ = get();
    need(api_ != nullptr, path + ": its GetPjrtApi gives nothing");
    const PJRT_Api_Version& found = api_->pjrt_api_version;
    need(found.major_version == PJRT_API_MAJOR && found.minor_version >= PJRT_API_MINOR,
         path + " speaks PJRT " + std::to_string(found.major_version) + "." +
             std::to_string(found.minor_version) + ", this runner was built for " +
             std::to_string(PJRT_API_MAJOR) + "." + std::to_string(PJRT_API_MINOR) +
             " or newer: build it with the plugin's own header");
    need(api_->struct_size >= PJRT_Api_STRUCT_SIZE,
         path + ": its table of functions has " + std::to_string(api_->struct_size) + " bytes, expected at least " +
             std::to_string(PJRT_Api_STRUCT_SIZE));
    PJRT_ARGS(PJRT_Plugin_Initialize_Args, args);
    check(api_->PJRT_Plugin_Initialize(&args), "initialising the plugin");
  }

  const PJRT_Api* operator->() const { return api_; }

  void check(PJRT_Error* error, const std::string& what) const {
    if (error == nullptr) return;
    PJRT_ARGS(PJRT_Error_Message_Args, message);
    message.error = error;
    api_->PJRT_Error_Message(&message);
    std::string text(message.message, message.message_size);
    PJRT_ARGS(PJRT_Error_Destroy_Args, gone);
    gone.error = error;
    api_->PJRT_Error_Destroy(&gone);
    fail(what + ": " + text);
  }

  // Waits for an event and frees it.
  void await(PJRT_Event* event, const std::string& what) const {
    PJRT_ARGS(PJRT_Event_Await_Args, wait);
    wait.event = event;
    PJRT_Error* error = api_->PJRT_Event_Await(&wait);
    destroy(event);
    check(error, what);
  }

  void destroy(PJRT_Event* event) const {
    PJRT_ARGS(PJRT_Event_Destroy_Args, gone);
    gone.event = event;
    api_->PJRT_Event_Destroy(&gone);
  }

 private:
  const PJRT_Api* api_;
};

// A device array; shared, since weights go into every call.
using Buffer = std::shared_ptr<PJRT_Buffer>;
using Buffers = std::vector<Buffer>;

inline PJRT_Buffer_Type buffer_type(const std::string& dtype) {
  static const std::map<std::string, PJRT_Buffer_Type> types = {
      {"bool", PJRT_Buffer_Type_PRED},         {"int8", PJRT_Buffer_Type_S8},
      {"uint8", PJRT_Buffer_Type_U8},          {"int32", PJRT_Buffer_Type_S32},
      {"uint32", PJRT_Buffer_Type_U32},        {"float16", PJRT_Buffer_Type_F16},
      {"bfloat16", PJRT_Buffer_Type_BF16},     {"float32", PJRT_Buffer_Type_F32},
      {"float8_e4m3fn", PJRT_Buffer_Type_F8E4M3FN}};
  auto found = types.find(dtype);
  need(found != types.end(), "arrays of " + dtype + " are unknown to this runner");
  return found->second;
}

// A client of a plugin; everything runs on its first device.
class Device {
 public:
  Device(const Plugin& plugin, const std::vector<PJRT_NamedValue>& options) : plugin_(plugin) {
    PJRT_ARGS(PJRT_Client_Create_Args, create);
    create.create_options = options.data();
    create.num_options = options.size();
    plugin_.check(plugin_->PJRT_Client_Create(&create), "opening the devices");
    client_ = create.client;
    PJRT_ARGS(PJRT_Client_AddressableDevices_Args, devices);
    devices.client = client_;
    plugin_.check(plugin_->PJRT_Client_AddressableDevices(&devices), "listing the devices");
    need(devices.num_addressable_devices > 0, "the plugin has no device");
    device_ = devices.addressable_devices[0];
    PJRT_ARGS(PJRT_Client_PlatformName_Args, name);
    name.client = client_;
    plugin_.check(plugin_->PJRT_Client_PlatformName(&name), "asking for the platform");
    platform_.assign(name.platform_name, name.platform_name_size);
    PJRT_ARGS(PJRT_Client_PlatformVersion_Args, version);
    version.client = client_;
    plugin_.check(plugin_->PJRT_Client_PlatformVersion(&version), "asking for the platform's version");
    version_.assign(version.platform_version, version.platform_version_size);
  }
  Device(const Device&) = delete;

  const Plugin& plugin() const { return plugin_; }
  PJRT_Client* client() const { return client_; }
  const std::string& platform() const { return platform_; }
  const std::string& version() const { return version_; }

  Buffer own(PJRT_Buffer* buffer) const {
    return Buffer(buffer, [this](PJRT_Buffer* b) {
      PJRT_ARGS(PJRT_Buffer_Destroy_Args, gone);
      gone.buffer = b;
      plugin_->PJRT_Buffer_Destroy(&gone);
    });
  }

  // An array of the host that outlives the buffer: a plugin for the CPU takes it as it lies.
  Buffer put(const void* data, PJRT_Buffer_Type type, const std::vector<int64_t>& dims, bool stays) const {
    PJRT_ARGS(PJRT_Client_BufferFromHostBuffer_Args, args);
    args.client = client_;
    args.data = data;
    args.type = type;
    args.dims = dims.data();
    args.num_dims = dims.size();
    args.host_buffer_semantics = stays ? PJRT_HostBufferSemantics_kImmutableZeroCopy
                                       : PJRT_HostBufferSemantics_kImmutableOnlyDuringCall;
    args.device = device_;
    plugin_.check(plugin_->PJRT_Client_BufferFromHostBuffer(&args), "copying to the device");
    plugin_.destroy(args.done_with_host_buffer);
    return own(args.buffer);
  }

  Buffer put(const std::vector<int32_t>& data, const std::vector<int64_t>& dims) const {
    return put(data.data(), PJRT_Buffer_Type_S32, dims, false);
  }

  std::vector<int32_t> get(const Buffer& buffer) const {
    PJRT_ARGS(PJRT_Buffer_ToHostBuffer_Args, args);
    args.src = buffer.get();
    plugin_.check(plugin_->PJRT_Buffer_ToHostBuffer(&args), "asking for a size");
    std::vector<int32_t> found(args.dst_size / sizeof(int32_t));
    args.dst = found.data();
    plugin_.check(plugin_->PJRT_Buffer_ToHostBuffer(&args), "copying from the device");
    plugin_.await(args.event, "copying from the device");
    return found;
  }

 private:
  const Plugin& plugin_;
  PJRT_Client* client_ = nullptr;
  PJRT_Device* device_ = nullptr;
  std::string platform_, version_;
};

// A program ready to run; which arguments are given up to the results stands in the program.
class Executable {
 public:
  // From StableHLO and a CompileOptionsProto, or from an executable of the same plugin.
  static Executable compile(const Device& device, std::string code, const std::string& options) {
    const std::string format = "mlir";
    PJRT_ARGS(PJRT_Program, program);
    program.code = code.data();
    program.code_size = code.size();
    program.format = format.data();
    program.format_size = format.size();
    PJRT_ARGS(PJRT_Client_Compile_Args, args);
    args.client = device.client();
    args.program = &program;
    args.compile_options = options.data();
    args.compile_options_size = options.size();
    device.plugin().check(device.plugin()->PJRT_Client_Compile(&args), "compiling");
    return Executable(device, args.executable);
  }

  static Executable load(const Device& device, const std::string& code) {
    PJRT_ARGS(PJRT_Executable_DeserializeAndLoad_Args, args);
    args.client = device.client();
    args.serialized_executable = code.data();
    args.serialized_executable_size = code.size();
    device.plugin().check(device.plugin()->PJRT_Executable_DeserializeAndLoad(&args), "loading an executable");
    return Executable(device, args.loaded_executable);
  }

  std::string serialize() const {
    const Plugin& plugin = device_->plugin();
    PJRT_ARGS(PJRT_Executable_Serialize_Args, args);
    args.executable = executable_;
    plugin.check(plugin->PJRT_Executable_Serialize(&args), "serialising an executable");
    std::string code(args.serialized_bytes, args.serialized_bytes_size);
    args.serialized_executable_deleter(args.serialized_executable);
    return code;
  }

  Buffers run(const Buffers& arguments) const {
    const Plugin& plugin = device_->plugin();
    std::vector<PJRT_Buffer*> in, out(num_outputs_);
    for (const Buffer& argument : arguments) in.push_back(argument.get());
    PJRT_Buffer* const* ins = in.data();
    PJRT_Buffer** outs = out.data();
    PJRT_ARGS(PJRT_ExecuteOptions, options);
    PJRT_ARGS(PJRT_LoadedExecutable_Execute_Args, args);
    args.executable = loaded_;
    args.options = &options;
    args.argument_lists = &ins;
    args.num_devices = 1;
    args.num_args = in.size();
    args.output_lists = &outs;
    plugin.check(plugin->PJRT_LoadedExecutable_Execute(&args), "running a program");
    Buffers results;
    for (PJRT_Buffer* buffer : out) results.push_back(device_->own(buffer));
    return results;
  }

 private:
  Executable(const Device& device, PJRT_LoadedExecutable* loaded) : device_(&device), loaded_(loaded) {
    PJRT_ARGS(PJRT_LoadedExecutable_GetExecutable_Args, get);
    get.loaded_executable = loaded_;
    device.plugin().check(device.plugin()->PJRT_LoadedExecutable_GetExecutable(&get), "reading a program");
    executable_ = get.executable;
    PJRT_ARGS(PJRT_Executable_NumOutputs_Args, count);
    count.executable = executable_;
    device.plugin().check(device.plugin()->PJRT_Executable_NumOutputs(&count), "reading a program");
    num_outputs_ = count.num_outputs;
  }

  const Device* device_;
  PJRT_LoadedExecutable* loaded_;
  PJRT_Executable* executable_ = nullptr;
  size_t num_outputs_ = 0;
};
