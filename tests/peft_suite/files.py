"""Which files of PEFT's tests run, which do not and why, and which tests are known to differ."""

RUN = (
    "test_custom_models.py",
    "test_initialization.py",
    "test_lora_variants.py",
    "test_lora_ga.py",
    "test_lorafa.py",
    "test_loraplus.py",
    "test_low_level_api.py",
    "test_mixed.py",
    "test_target_parameters.py",
    "test_tuners_utils.py",
    "test_riemannian_lora.py",
    "test_bdlora.py",
    "test_velora.py",
    "test_arrow.py",
    "test_helpers.py",
    "test_other.py",
    "test_unilora.py",
    "test_trainable_tokens.py",
    "test_lora_conversion.py",
    "test_integrations.py",
)

_HUB = "every test wants a model of the hub"
_NO_CALLS = "no test calls a LoRA layer without a model of the hub"
_GPU = "a GPU"
LEFT_OUT = {
    "test_auto.py": _HUB,
    "test_common_gpu.py": _GPU,
    "test_config.py": _NO_CALLS,
    "test_decoder_models.py": _HUB,
    "test_encoder_decoder_models.py": _HUB,
    "test_feature_extraction_models.py": _HUB,
    "test_gptqmodel.py": _GPU,
    "test_gpu_examples.py": _GPU,
    "test_hub_features.py": _NO_CALLS,
    "test_lora_intruders.py": _HUB,
    "test_lora_megatron.py": "wants Megatron",
    "test_mapping.py": _NO_CALLS,
    "test_randlora.py": _NO_CALLS,
    "test_seq_classifier.py": _HUB,
    "test_stablediffusion.py": _HUB,
    "test_token_classification_qa.py": _HUB,
    "test_torch_compile.py": _HUB,
    "test_vision_models.py": _HUB,
    "test_xlora.py": _HUB,
}

_NAME = "it wants the name of PEFT's class, not the fused one's"
_STATUS = "tests/test_tuners_utils.py::TestModelAndLayerStatus"
KNOWN = {
    "tests/test_custom_models.py::TestLayerRepr::test_repr_lora_linear": _NAME,
    "tests/test_custom_models.py::TestLayerRepr::test_repr_lora_embedding": _NAME,
    "tests/test_custom_models.py::TestLayerRepr::test_repr_lora_conv1d": _NAME,
    "tests/test_custom_models.py::TestLayerRepr::test_repr_lora_conv2d": _NAME,
    "tests/test_custom_models.py::TestMixedAdapterBatches::test_mixed_adapter_batches_mha_raises"
    "[LoRA mixed adapter with mha-config00-config10]": _NAME,
    "tests/test_custom_models.py::TestMixedAdapterBatches::test_mixed_adapter_batches_lora_with_dora_raises": (
        "it wants an error for DoRA in adapter_names, which fused layers compute"
    ),
    f"{_STATUS}::test_module_type_small": _NAME,
    f"{_STATUS}::test_module_type_large": _NAME,
    f"{_STATUS}::test_model_with_injected_layers": _NAME,
    f"{_STATUS}::test_target_parameters_and_target_modules": _NAME,
    "tests/test_helpers.py::TestDoraCaching::test_dora_caching_conv": (
        "it looks for the norm in PEFT's cache, which fused layers do not fill"
    ),
    "tests/test_initialization.py::TestLoraInitialization::test_lora_use_dora_linear": (
        "it wants float32 sums of 1000 products equal to 1e-8, whatever their order"
    ),
}
"""Tests that may fail on fused layers alone, with the reason."""

CHEAPER = " cost PEFT less"
"""Ends reasons that are a choice, for PEFT's forward is faster there: such calls do not count."""

MINIMUM = 0.94
"""The share of the calls with arithmetic to do that must be fast."""
