"""XLA's flags for tests: programs compile in a third of the processor time and run slower."""

DEVICES = "--xla_force_host_platform_device_count"
FAST = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)
