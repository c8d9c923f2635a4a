"""JSON schemas of the fields that the files of launch/ set, and of no other.

From the types of JobSet (api/jobset/v1alpha2/jobset_types.go), of Kubernetes' batch/v1 and core/v1,
and of SkyPilot (docs/source/reference/yaml-spec.rst).
"""

from typing import Any

TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 1}
NAME = {"type": "string", "pattern": "^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$"}


def fields(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """An object with these fields and no other."""
    return {
        "type": "object",
        "properties": required | optional,
        "required": list(required),
        "additionalProperties": False,
    }


def items(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": schema, "minItems": 1}


ENV = {
    "oneOf": [
        fields({"name": TEXT, "value": {"type": "string"}}),
        fields({"name": TEXT, "valueFrom": fields({"fieldRef": fields({"fieldPath": TEXT})})}),
    ]
}
CONTAINER = fields(
    {
        "name": NAME,
        "image": TEXT,
        "args": items(TEXT),
        "env": items(ENV),
        "resources": fields(
            {
                "limits": {
                    "type": "object",
                    "propertyNames": {"enum": ["google.com/tpu", "nvidia.com/gpu"]},
                    "additionalProperties": COUNT,
                }
            }
        ),
        "volumeMounts": items(
            fields(
                {"name": NAME, "mountPath": {"type": "string", "pattern": "^/"}},
                readOnly={"type": "boolean"},
            )
        ),
    },
    securityContext=fields(
        {"privileged": {"type": "boolean"}, "runAsUser": {"type": "integer", "minimum": 0}}
    ),
)
VOLUME = fields(
    {"name": NAME},
    persistentVolumeClaim=fields({"claimName": NAME}),
    emptyDir=fields({"medium": {"const": "Memory"}}),
    configMap=fields({"name": NAME}),
)
LABELS = {"type": "object", "additionalProperties": TEXT}
POD = fields(
    {
        "restartPolicy": {"const": "Never"},
        "terminationGracePeriodSeconds": COUNT,
        "containers": items(CONTAINER),
        "volumes": items(VOLUME),
    },
    nodeSelector=LABELS,
    hostNetwork={"type": "boolean"},
    dnsPolicy={"enum": ["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"]},
    tolerations=items(
        fields(
            {"key": TEXT, "operator": {"enum": ["Exists", "Equal"]}},
            effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
        )
    ),
)
EXIT_CODES = fields(
    {
        "containerName": NAME,
        "operator": {"enum": ["In", "NotIn"]},
        "values": items({"type": "integer", "minimum": 1, "maximum": 255}),
    }
)
JOB = fields(
    {
        "completionMode": {"const": "Indexed"},
        "parallelism": COUNT,
        "completions": COUNT,
        "backoffLimit": {"type": "integer", "minimum": 0},
        "podFailurePolicy": fields(
            {"rules": items(fields({"action": {"const": "FailJob"}, "onExitCodes": EXIT_CODES}))}
        ),
        "template": fields({"spec": POD}),
    }
)
ACTIONS = ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
JOBSET = fields(
    {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": fields({"name": NAME, "labels": LABELS}, annotations=LABELS),
        "spec": fields(
            {
                "failurePolicy": fields(
                    {
                        "maxRestarts": {"type": "integer", "minimum": 0},
                        "restartStrategy": {
                            "enum": ["Recreate", "BlockingRecreate", "InPlaceRestart"]
                        },
                        "rules": items(
                            fields(
                                {
                                    "name": {
                                        "type": "string",
                                        "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$",
                                    },
                                    "action": {"enum": ACTIONS},
                                    "onJobFailureReasons": items({"const": "PodFailurePolicy"}),
                                }
                            )
                        ),
                    }
                ),
                "replicatedJobs": items(
                    fields({"name": NAME, "replicas": COUNT, "template": fields({"spec": JOB})})
                ),
            },
            network=fields(
                {
                    "enableDNSHostnames": {"type": "boolean"},
                    "publishNotReadyAddresses": {"type": "boolean"},
                }
            ),
        ),
    }
)
CONFIG_MAP = fields(
    {
        "apiVersion": {"const": "v1"},
        "kind": {"const": "ConfigMap"},
        "metadata": fields({"name": NAME}),
        "data": fields({"run.yaml": TEXT}),
    }
)
SKY = fields(
    {
        "name": NAME,
        "workdir": TEXT,
        "num_nodes": COUNT,
        "resources": fields(
            {
                "accelerators": {
                    "type": "string",
                    "pattern": r"^(tpu-v\d\w*-\d+|[A-Z][A-Z0-9-]*(GB)?:\d+)$",
                },
                "use_spot": {"type": "boolean"},
                "job_recovery": fields(
                    {
                        "strategy": {"enum": ["EAGER_NEXT_REGION", "FAILOVER"]},
                        "max_restarts_on_errors": {"type": "integer", "minimum": 0},
                        "recover_on_exit_codes": items({"type": "integer"}),
                    }
                ),
            },
            infra={"const": "gcp"},
            accelerator_args=fields({"runtime_version": TEXT}),
        ),
        "file_mounts": {
            "type": "object",
            "propertyNames": {"pattern": "^/"},
            "additionalProperties": fields({"name": TEXT, "mode": {"const": "MOUNT"}}),
        },
        "envs": {"type": "object", "additionalProperties": {"type": "string"}},
        "setup": TEXT,
        "run": TEXT,
    }
)
