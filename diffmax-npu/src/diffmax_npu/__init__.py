"""diffmax on Huawei Ascend. Nothing to import here: diffmax finds it by its entry point."""
