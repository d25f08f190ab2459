"""XLA's flags for tests.

Programs compile in a third of the processor time and run slower. Collectives among fake devices wait for
threads that a busy machine delays; XLA's default is to abort the process after 40 seconds.
"""

DEVICES = "--xla_force_host_platform_device_count"
FAST = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1 "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters "
    "--xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_cpu_collective_timeout_seconds=600"
)
