"""TrainingArguments of two short steps that leave nothing behind."""

OPTIONS = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
}
