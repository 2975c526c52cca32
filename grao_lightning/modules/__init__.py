"""LightningModules: one file a method, on a shared base."""
