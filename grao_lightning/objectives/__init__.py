"""Pure objectives: one file per method, torch only, one signature, named terms."""
