"""What trained networks are measured with: functions of arrays, features and outputs in, numbers out."""
