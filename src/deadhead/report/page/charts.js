'use strict';
// What each chart shows: functions from a run's facts to Plotly's traces and layout, and the same as a table.

const COLOURS = { kept: '#0072b2', cut: '#d55e00', control: '#6b6b6b', extra: '#009e73', line: '#d8d8d8' };
const FONT = { family: 'system-ui, "Segoe UI", "DejaVu Sans", sans-serif', size: 13, color: '#1b1b1b' };
const SHADES = [[0, '#ffffff'], [1, COLOURS.kept]];
const STAGES = { dense: 'dense', gated: 'gated', cut: 'cut', finetuned: 'fine-tuned', control: 'dense control' };

/** Layout that all charts share. */
function layout(height, more) {
  return { height, font: FONT, paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)',
    margin: { l: 62, r: 16, t: 24, b: 44 }, hoverlabel: { font: FONT, bgcolor: '#ffffff' },
    legend: { orientation: 'h', y: 1, yanchor: 'bottom', x: 0 }, ...more };
}

function axis(title, more = {}) {
  return { title: { text: title }, gridcolor: COLOURS.line, zerolinecolor: COLOURS.line, automargin: true, ...more };
}

/** Loss, validation perplexity, L0, λ and sparsity over all phases, one below the other on one axis of steps. */
function trainingChart(facts) {
  const traces = [];
  const rows = [];
  const curve = (name, title, look) => {
    const found = facts.phases.filter((phase) => phase.scalars[name] && (!look.when || look.when(phase)));
    for (const phase of found) {
      const [steps, values] = phase.scalars[name];
      const isControl = phase.name.startsWith('control');
      traces.push({ type: 'scatter', mode: steps.length === 1 || look.points ? 'lines+markers' : 'lines',
        name: isControl ? 'dense control' : look.name || title, x: steps.map((step) => step + phase.begin), y: values,
        row: rows.length, legendgroup: isControl ? 'control' : look.name || title, showlegend: false,
        line: { color: isControl ? COLOURS.control : look.colour || COLOURS.kept, width: 1.6,
          dash: isControl ? 'dash' : look.dash || 'solid' },
        hovertemplate: `${plain(phase.title)}, step %{x:,}<br>${isControl ? 'dense control: ' : ''}${look.name || title} %{y:.4~g}<extra></extra>` });
    }
    return found.length > 0;
  };
  const stages = Object.keys(STAGES).filter((stage) => facts.summary[stage]);
  const add = (title, ...filled) => { if (filled.some(Boolean)) rows.push(title); };

  add('loss, nats', curve('loss', 'loss', {}));
  let any = curve('eval_perplexity', 'perplexity', { points: true });
  if (stages.length) {
    any = true;
    const symbols = { dense: 'square', gated: 'circle-open', cut: 'x', finetuned: 'circle', control: 'diamond' };
    traces.push({ type: 'scatter', mode: 'markers+text', name: 'whole evaluation', row: rows.length, showlegend: false,
      x: stages.map((stage) => facts.summary[stage].steps), y: stages.map((stage) => facts.summary[stage].perplexity),
      text: stages.map((stage) => STAGES[stage]), textposition: stages.map((stage) => stage === 'cut' || stage === 'finetuned' ? 'top left' : 'bottom left'),
      textfont: { size: 11 }, cliponaxis: false,
      marker: { size: 9, symbol: stages.map((stage) => symbols[stage]),
        color: stages.map((stage) => stage === 'control' ? COLOURS.control : stage === 'cut' ? COLOURS.cut : COLOURS.kept) },
      hovertemplate: '%{text} model, step %{x:,}<br>validation perplexity %{y:.4~g}<extra></extra>' });
  }
  add('perplexity', any);
  add('L0', curve('l0', 'L0', { colour: COLOURS.extra }));
  const hasLambda = (phase) => phase.scalars.lambda[1].some((value) => value);
  add('λ', curve('lambda', 'λ', { colour: COLOURS.extra, when: hasLambda }));
  const shares = [curve('sparsity', 'share', { name: 'heads closed', colour: COLOURS.cut }),
    curve('block_sparsity', 'share', { name: 'blocks closed', colour: COLOURS.cut, dash: 'dot' }),
    curve('budget', 'share', { name: 'of the budget’s cost left', colour: COLOURS.extra, dash: 'dashdot' })];
  add('closed', ...shares);

  const height = 110 * Math.max(rows.length, 1) + 104;
  const found = layout(height, { hovermode: 'closest', shapes: [], annotations: [], margin: { l: 62, r: 16, t: 38, b: 44 } });
  const gap = 0.045;
  const tall = rows.length ? (1 - gap * (rows.length - 1)) / rows.length : 1;
  rows.forEach((title, row) => {
    const top = 1 - row * (tall + gap);
    found[row ? `yaxis${row + 1}` : 'yaxis'] = axis(title, { domain: [Math.max(0, top - tall), top], nticks: 4,
      ...(title === 'closed' ? { tickformat: '.0%', rangemode: 'tozero' } : {}),
      ...(title === 'perplexity' && isWide(traces.filter((trace) => trace.row === row)) ? { type: 'log' } : {}) });
  });
  found.xaxis = axis('step of the whole run', { anchor: rows.length > 1 ? `y${rows.length}` : 'y' });
  for (const trace of traces) {
    trace.yaxis = trace.row ? `y${trace.row + 1}` : 'y';
    delete trace.row;
  }
  facts.phases.filter((phase) => !phase.name.startsWith('control') && phase.steps).forEach((phase, place) => {
    found.shapes.push({ type: 'line', xref: 'x', yref: 'paper', x0: phase.begin, x1: phase.begin, y0: 0, y1: 1,
      line: { color: COLOURS.control, width: 1, dash: 'dot' } });
    found.annotations.push({ xref: 'x', yref: 'paper', x: phase.begin, y: 1, yanchor: 'bottom', xanchor: 'left',
      // One above the other: short phases are narrower than their names.
      text: plain(phase.title), showarrow: false, font: { size: 11 }, yshift: place % 2 ? 13 : 0 });
  });
  const table = facts.phases.flatMap((phase) => (phase.scalars.loss ? phase.scalars.loss[0] : []).map((step, place) => [
    `${phase.title}, step ${step}`, phase.scalars.loss[1][place],
    ...['l0', 'lambda', 'sparsity'].map((name) => valueAt(phase.scalars[name], step))]));
  return { traces, layout: found, say: 'Loss, validation perplexity, L0, lambda and sparsity over the steps of the run',
    table: ['Training', ['step', 'loss', 'L0', 'λ', 'sparsity'], table] };
}

/** Whether a curve falls so far that only logarithms show its end. */
function isWide(traces) {
  const values = traces.flatMap((trace) => trace.y).filter((value) => value > 0);
  return Math.max(...values) > 8 * Math.min(...values);
}

function valueAt(curve, step) {
  const place = curve ? curve[0].indexOf(step) : -1;
  return place < 0 ? null : curve[1][place];
}

/** The open probability of every gate: a row for each, a column for each step. */
function gatesChart(facts, open) {
  const { steps, layers } = facts.gates;
  const shown = layers.filter((layer) => open.has(layer.key));
  const z = [];
  const names = [];
  const ticks = [];
  for (const layer of shown) {
    const values = open.get(layer.key);
    ticks.push([names.length, `${layer.what === 'block' ? 'blocks ' : ''}${layer.layer}`]);
    for (let index = 0; index < layer.total; index++) {
      z.push(steps.map((_, frame) => Math.round(values[frame * layer.total + index] / 2.55) / 100));
      names.push(`layer ${layer.layer}, ${layer.what} ${index}`);
    }
  }
  const height = Math.min(620, Math.max(180, 90 + 9 * names.length));
  const most = Math.max(1, Math.floor(ticks.length / 24));
  const marked = ticks.filter((_, place) => place % most === 0);
  const traces = z.length ? [{ type: 'heatmap', x: steps, z, zmin: 0, zmax: 1, colorscale: SHADES,
    customdata: names.map((name) => steps.map(() => plain(name))), colorbar: { title: { text: 'open' }, thickness: 12, tickformat: '.0%' },
    hovertemplate: '%{customdata}<br>step %{x}: open in %{z:.0%} of the draws<extra></extra>' }] : [];
  return { traces, say: 'Open probability of every gate over the steps of the phase with gates',
    layout: layout(height, { margin: { l: 62, r: 8, t: 8, b: 44 }, xaxis: axis('step of the phase with gates', { showgrid: false }),
      yaxis: axis('layer', { autorange: 'reversed', showgrid: false, zeroline: false, tickmode: 'array',
        tickvals: marked.map(([row]) => row), ticktext: marked.map(([, name]) => plain(name)) }) }),
    table: ['Open probability at the first and the last step', ['gate', ...(steps.length ? [`step ${steps[0]}`, `step ${steps[steps.length - 1]}`] : [])],
      names.map((name, row) => [name, z[row][0], z[row][steps.length - 1]])] };
}

/** The courses of the gates of one layer. */
function layerChart(facts, open, chosen) {
  const layer = facts.gates.layers.find((one) => one.key === chosen.key);
  const values = layer && open.get(layer.key);
  if (!values) return { traces: [], layout: layout(180), say: 'No gate has been logged yet', table: ['Gates', ['head'], []] };
  const { steps } = facts.gates;
  const kept = layer.kept && new Set(layer.kept);
  const traces = Array.from({ length: layer.total }, (_, index) => {
    const stays = kept ? kept.has(index) : values[(steps.length - 1) * layer.total + index] >= 128;
    return { type: 'scatter', mode: 'lines', name: `${layer.what} ${index}`, x: steps, showlegend: false,
      y: steps.map((_, frame) => values[frame * layer.total + index] / 255),
      line: { color: stays ? COLOURS.kept : COLOURS.cut, dash: stays ? 'solid' : 'dash', width: index === chosen.index ? 4 : 1.4 },
      hovertemplate: `${layer.what} ${index}, step %{x}: open in %{y:.0%} of the draws<extra></extra>` };
  });
  return { traces, say: `Open probability of each ${layer.what} of layer ${layer.layer}`,
    caption: `Layer ${layer.layer}: solid stays, dashed is cut, thick is the one chosen.`,
    layout: layout(240, { margin: { l: 62, r: 16, t: 10, b: 44 }, xaxis: axis('step of the phase with gates'),
      yaxis: axis('open', { range: [-0.03, 1.03], tickformat: '.0%' }) }),
    table: [`Layer ${layer.layer}`, ['step', ...traces.map((trace) => trace.name)], steps.map((step, frame) => [step, ...traces.map((trace) => trace.y[frame])])] };
}

/** What share of the dense model is left of each cost. */
function costsChart(facts) {
  const { dense, finetuned } = facts.summary;
  const rows = [];
  const add = (name, before, after, unit, show = digits) => {
    if (before && after !== undefined && after !== null) rows.push({ name, share: after / before, before: show(before) + unit, after: show(after) + unit });
  };
  const sum = (values) => values ? values.reduce((total, value) => total + value, 0) : undefined;
  const { dense: denseCost, finetuned: cutCost } = facts.costs;
  if (dense && finetuned) {
    add('heads', sum(dense.heads), sum(finetuned.heads), '');
    if (sum(dense.blocks)) add('blocks', sum(dense.blocks), sum(finetuned.blocks), '');
    add('parameters', dense.parameters, finetuned.parameters, '');
    add('FLOPs a token', dense.flops_per_token, finetuned.flops_per_token, '');
  }
  if (denseCost && cutCost) add('key/value cache', denseCost.kv_cache_bytes, cutCost.kv_cache_bytes, ' bytes');
  if (facts.finished) add('time a token', 1e6 / dense.tokens_per_second, 1e6 / finetuned.tokens_per_second, ' µs');
  rows.reverse();
  const traces = rows.length ? [{ type: 'bar', orientation: 'h', x: rows.map((row) => row.share), y: rows.map((row) => row.name),
    marker: { color: COLOURS.kept }, text: rows.map((row) => percent.format(row.share)), textposition: 'auto',
    customdata: rows.map((row) => `${row.before} → ${row.after}`),
    hovertemplate: '%{y}: %{customdata}<extra></extra>' }] : [];
  const widest = Math.max(1, ...rows.map((row) => row.share));
  return { traces, say: 'Share of the dense model that is left', layout: layout(60 + 44 * Math.max(rows.length, 3), {
    margin: { l: 110, r: 16, t: 8, b: 44 }, bargap: 0.35, yaxis: axis('', { showgrid: false }),
    xaxis: axis('share of the dense model', { range: [0, widest * 1.02], tickformat: '.0%' }),
    shapes: [{ type: 'line', x0: 1, x1: 1, y0: 0, y1: 1, yref: 'paper', line: { color: COLOURS.control, dash: 'dot' } }] }),
    table: ['Dense against cut', ['', 'dense', 'pruned', 'left'], rows.slice().reverse().map((row) => [row.name, row.before, row.after, percent.format(row.share)])] };
}

/** Perplexity against size, of this run's models and those of the runs beside it. */
function sizeChart(facts, others, size) {
  const points = [...facts.points, ...others];
  const symbols = { dense: 'square', cut: 'x', finetuned: 'circle', control: 'diamond' };
  const traces = [];
  for (const [isThis, name] of [[false, 'other runs'], [true, 'this run']]) {
    for (const stage of Object.keys(symbols)) {
      const found = points.filter((point) => point.this === isThis && point.stage === stage && point.perplexity !== null);
      if (!found.length) continue;
      traces.push({ type: 'scatter', mode: 'markers', name: isThis ? STAGES[stage] : name,
        showlegend: isThis || !traces.length,
        x: found.map((point) => point[size]), y: found.map((point) => point.perplexity),
        marker: { symbol: symbols[stage], size: isThis ? 13 : 9, opacity: isThis ? 1 : 0.7,
          color: stage === 'control' ? COLOURS.control : stage === 'cut' ? COLOURS.cut : isThis ? COLOURS.kept : '#56b4e9' },
        text: found.map((point) => plain(point.run)), customdata: found.map((point) => point.steps),
        hovertemplate: `%{text}, ${STAGES[stage]}, %{customdata:,} steps<br>%{x:,} ${size === 'parameters' ? 'parameters' : 'FLOPs a token'}, perplexity %{y:.4~g}<extra></extra>` });
    }
  }
  return { traces, say: 'Perplexity against size of this run and others', layout: layout(340, { margin: { l: 62, r: 16, t: 48, b: 44 },
    xaxis: axis(size === 'parameters' ? 'parameters' : 'FLOPs a token', { rangemode: 'tozero' }), yaxis: axis('validation perplexity') }),
    table: ['Perplexity against size', ['model', 'parameters', 'FLOPs a token', 'steps', 'perplexity'],
      points.map((point) => [`${point.run}, ${STAGES[point.stage]}`, point.parameters, point.flops_per_token, point.steps, point.perplexity])] };
}

/** The output difference of each head, layer by layer. */
function differenceChart(facts, chosen) {
  const groups = { stays: { x: [], y: [], names: [], sizes: [] }, cut: { x: [], y: [], names: [], sizes: [] } };
  const table = [];
  const layers = facts.gates.layers.filter((layer) => layer.what === 'head' && layer.difference.length);
  layers.forEach((layer, row) => {
    const kept = layer.kept && new Set(layer.kept);
    layer.difference.forEach((value, index) => {
      const group = groups[!kept || kept.has(index) ? 'stays' : 'cut'];
      group.x.push(row + 0.7 * ((index + 0.5) / layer.total - 0.5));
      group.y.push(value);
      group.names.push(plain(`layer ${layer.layer}, head ${index}`));
      group.sizes.push(chosen.key === layer.key && chosen.index === index ? 15 : 9);
      table.push([`layer ${layer.layer}, head ${index}`, value, !kept || kept.has(index) ? 'stays' : 'cut']);
    });
  });
  const look = { stays: ['circle', COLOURS.kept], cut: ['x', COLOURS.cut] };
  const traces = Object.entries(groups).filter(([, group]) => group.x.length).map(([name, group]) => ({
    type: 'scatter', mode: 'markers', name, x: group.x, y: group.y, text: group.names,
    marker: { symbol: look[name][0], color: look[name][1], size: group.sizes },
    hovertemplate: `%{text} ${name === 'cut' ? 'is cut' : 'stays'}<br>output difference %{y:.3~g}<extra></extra>` }));
  const stride = Math.max(1, Math.ceil(layers.length / 16));
  const ticks = layers.map((layer, row) => [row, layer.layer]).filter(([row]) => row % stride === 0);
  return { traces, say: 'Output difference of each head', layout: layout(340, { xaxis: axis('layer', { showgrid: false, zeroline: false, tickmode: 'array',
    tickvals: ticks.map(([row]) => row), ticktext: ticks.map(([, name]) => plain(name)) }), yaxis: axis('output difference', { rangemode: 'tozero' }) }),
    table: ['Output difference', ['head', 'output difference', ''], table] };
}

/** The attention pattern of the chosen head, or of every query head of the chosen group. */
function attentionChart(facts, patterns, chosen) {
  const layer = facts.gates.layers.find((one) => one.key === chosen.key);
  const found = patterns && layer && layer.what === 'head' ? patterns.layers[layer.layer] : null;
  const queries = found ? queryHeads(found.total, facts, layer, chosen.index) : [];
  const present = found ? queries.filter((head) => found.heads.includes(head)) : [];
  if (!present.length) {
    const text = !patterns ? 'No attention has been read yet' : layer && layer.what === 'block' ? 'Blocks have no attention of their own' : 'This head was cut: it looks nowhere any more';
    return { traces: [], say: text, table: [text, ['token'], []], layout: layout(180, { xaxis: { visible: false }, yaxis: { visible: false },
      annotations: [{ text, showarrow: false, xref: 'paper', yref: 'paper', x: 0.5, y: 0.5 }] }) };
  }
  const weights = found.unpacked ||= bytes(found.weights);
  const rows = patterns.tokens.length;
  const columns = patterns.columns.length;
  const shown = present.slice(0, 8);
  const size = Math.max(300, Math.min(560, 120 + 13 * rows));
  const result = layout(size, { margin: { l: 70, r: 8, t: 34, b: 74 }, annotations: [] });
  const traces = shown.map((head, place) => {
    const begin = found.heads.indexOf(head) * rows * columns;
    const z = Array.from({ length: rows }, (_, row) => Array.from(weights.subarray(begin + row * columns, begin + (row + 1) * columns), (w) => w / 255));
    const suffix = place ? place + 1 : '';
    const width = 1 / shown.length;
    const common = { showgrid: false, zeroline: false, tickmode: 'array', ticks: '', tickfont: { size: 10 } };
    result[`xaxis${suffix}`] = axis('is read', { ...common, domain: [place * width, (place + 0.92) * width], tickangle: -90,
      tickvals: patterns.columns.map((_, i) => i), ticktext: patterns.columns.map(plain), anchor: `y${suffix}` });
    result[`yaxis${suffix}`] = axis(place ? '' : 'reads', { ...common, autorange: 'reversed', anchor: `x${suffix}`, showticklabels: !place,
      tickvals: patterns.tokens.map((_, i) => i), ticktext: patterns.tokens.map(plain) });
    result.annotations.push({ text: plain(`layer ${layer.layer}, head ${head}`), showarrow: false, xref: `x${suffix} domain`, yref: 'paper', x: 0, y: 1, yanchor: 'bottom' });
    return { type: 'heatmap', z, zmin: 0, zmax: 1, colorscale: SHADES, showscale: place === shown.length - 1,
      colorbar: { thickness: 12 }, xaxis: `x${suffix}`, yaxis: `y${suffix}`,
      text: z.map((row, r) => row.map((_, c) => plain(`${patterns.tokens[r]} reads ${patterns.columns[c]}`))),
      hovertemplate: '%{text}<br>%{z:.0%}<extra></extra>' };
  });
  return { traces, layout: result, say: `Attention pattern of layer ${layer.layer}, head ${shown.join(', ')}`,
    table: [`Layer ${layer.layer}, head ${shown[0]}`, ['reads', ...patterns.columns], traces[0].z.map((row, r) => [patterns.tokens[r], ...row])] };
}

/** Which query heads a unit has: itself, or all those that share its keys and values. */
function queryHeads(total, facts, layer, index) {
  if (facts.unit !== 'kv_group') return [index];
  const each = Math.max(1, Math.round(total / layer.total));
  return Array.from({ length: each }, (_, place) => index * each + place);
}
