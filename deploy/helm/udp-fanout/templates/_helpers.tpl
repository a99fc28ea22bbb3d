{{- define "udp-fanout.selector" -}}
app.kubernetes.io/name: {{ .Values.name }}
{{- end }}

{{- define "udp-fanout.labels" -}}
{{ include "udp-fanout.selector" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "udp-fanout.serviceAccount" -}}
{{ .Values.serviceAccount.name | default .Values.name }}
{{- end }}

{{- /* The port and path of the metrics page; nothing if there is none. */ -}}
{{- define "udp-fanout.metricsPort" -}}
{{- with .Values.config.metrics }}
{{- if ne (get . "enabled" | toString) "false" }}{{ .bind | default "0.0.0.0:9090" | splitList ":" | last }}{{ end }}
{{- end }}
{{- end }}

{{- /* Namespace → names of the Services that listeners follow there, as JSON. */ -}}
{{- define "udp-fanout.services" -}}
{{- $found := dict }}
{{- range $listener := .Values.config.listeners }}
{{- with $listener.kubernetes }}
{{- $common := .namespace | default $.Release.Namespace }}
{{- $services := .services | default (list (dict "service" .service)) }}
{{- range $service := $services }}
{{- $service := ternary (dict "service" $service) $service (kindIs "string" $service) }}
{{- $namespace := $service.namespace | default $common }}
{{- $_ := set $found $namespace (append (get $found $namespace | default list) $service.service | uniq | sortAlpha) }}
{{- end }}
{{- end }}
{{- end }}
{{- toJson $found }}
{{- end }}
