// What ggml's Vulkan backend takes from headers of 1.3.272 or later, for the older ones of Debian 12: a setting of the validation layer,
// which is only read where GGML_VULKAN_VALIDATE asks for that layer. Included before everything (CXXFLAGS=-include); `make vulkan` does so.
#ifdef __cplusplus
#include <vulkan/vulkan_core.h>
#if VK_HEADER_VERSION < 272
#include <cstdint>
#include <vector>

namespace vk {
enum class LayerSettingTypeEXT { eBool32 = 0 };

struct LayerSettingEXT {
    const char *layer, *setting;
    LayerSettingTypeEXT type;
    uint32_t count;
    const void *values;
};

struct LayerSettingsCreateInfoEXT {
    explicit LayerSettingsCreateInfoEXT(const std::vector<LayerSettingEXT> &all)
        : count(static_cast<uint32_t>(all.size())), settings(all.data()) {}
    uint32_t type = 1000496000;  // VK_STRUCTURE_TYPE_LAYER_SETTINGS_CREATE_INFO_EXT; an older loader skips it
    const void *next = nullptr;
    uint32_t count;
    const LayerSettingEXT *settings;
};
}  // namespace vk
#endif
#endif
